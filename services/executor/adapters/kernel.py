"""The Linux calls that Python 3.11 does not offer: prctl, namespaces and mounts. Each raises OSError."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 15, 36, 38
_PR_SET_SECCOMP, _PR_CAPBSET_DROP = 22, 24
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION = 0x20080522
_NS_GET_USERNS = 0xB701

_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Have the kernel send `number` when `parent` dies; raises when it died already.

    A change of user or of namespace clears the setting, so it comes after those.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number)), "prctl")
    if os.getppid() != parent:
        raise ProcessLookupError(f"the parent {parent} is gone")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies: none can slip away by forking twice."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1)), "prctl")


def refuse_new_privileges() -> None:
    """Make setuid programs powerless for this process and all that it starts."""
    unused = ctypes.c_ulong(0)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), unused, unused, unused), "prctl")


def set_name(name: str) -> None:
    """The name that ps and top show (15 bytes)."""
    _check(_libc.prctl(_PR_SET_NAME, name.encode()), "prctl")


def become(uid: int) -> None:
    """Turn a root process into an ordinary user with a group of the same number, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def own_mounts() -> None:
    """Give this process mounts of its own: what it mounts from here on, nobody else sees."""
    _check(_libc.unshare(CLONE_NEWNS), "unshare")
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount /")


def mount_tmpfs(target: str) -> None:
    _check(_libc.mount(b"tmpfs", os.fsencode(target), b"tmpfs", ctypes.c_ulong(0), b"mode=0755"), target)


def bind(source: str, target: str) -> None:
    flags = ctypes.c_ulong(_MS_BIND | _MS_REC)
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), None, flags, None), target)


def open_network(pid: int) -> int:
    """A descriptor of the network namespace that the process is in."""
    return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def enter_network(network: int) -> None:
    """Move this single-threaded process into a network namespace, without being root.

    Its owner is asked of the namespace, not of the process: bwrap moves on into a second user namespace,
    which has no rights over the network that the first one made. Root needs no rights from the owner, and keeps its
    own: it may give up root afterwards.
    """
    if os.geteuid() == 0:
        _check(_libc.setns(network, CLONE_NEWNET), "setns net")
        return
    join_owner_of(network)
    _check(_libc.setns(network, CLONE_NEWNET), "setns net")


def join_namespace(namespace: int) -> None:
    """Move this process into a namespace of any kind; into one of processes, what it forks from then on."""
    _check(_libc.setns(namespace, 0), "setns")


def join_owner_of(namespace: int) -> None:
    """Move this single-threaded process into the user namespace that owns another one, and gain all rights there."""
    owner = fcntl.ioctl(namespace, _NS_GET_USERNS)
    try:
        _check(_libc.setns(owner, CLONE_NEWUSER), "setns user")
    finally:
        os.close(owner)


def drop_bounding_capabilities() -> None:
    """No program that this process becomes can give it any."""
    for number in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number)) < 0:
            if ctypes.get_errno() == errno.EINVAL:  # beyond the last that the kernel knows
                return
            _check(-1, "prctl")


def drop_capabilities() -> None:
    """A change of user keeps them where the former user was not that namespace's root."""
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    _check(_libc.capset(header, struct.pack("6I", *[0] * 6)), "capset")


def filter_calls(program: bytes) -> None:
    """Have the kernel judge this process's system calls, and those of all that it starts, by a BPF program."""
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HL", len(program) // 8, ctypes.addressof(code))
    _check(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), described), "prctl")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
