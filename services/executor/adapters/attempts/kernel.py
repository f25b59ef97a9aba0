"""The Linux calls that Python 3.11 does not offer: prctl, namespaces and mounts. Each raises OSError."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 15, 36, 38
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 4, 22, 24
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_NS_GET_USERNS, _NS_GET_OWNER_UID = 0xB701, 0xB704

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


def become_root_of(first_uid: int, count: int) -> None:
    """Move this single-threaded root process into new user and mount namespaces, whose users 0, 1, ... are outside
    first_uid and those after it; for good, and as root of nothing else.
    """
    told, tell = os.pipe()
    pid, writer = os.getpid(), os.fork()
    if writer == 0:
        failed = 1
        try:
            os.close(tell)
            if os.read(told, 1):
                for name in ("uid_map", "gid_map"):
                    with open(f"/proc/{pid}/{name}", "w") as file:
                        file.write(f"0 {first_uid} {count}")
                failed = 0
        finally:
            os._exit(failed)
    os.close(told)
    try:
        _check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare")
        os.write(tell, b"x")
    finally:
        os.close(tell)
        status = os.waitpid(writer, 0)[1]
    if status:
        raise OSError(f"the users from {first_uid} cannot be mapped here")
    become(0)


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


def owner_of(network: int) -> int:
    """A descriptor of the user namespace whose root rules over this network namespace."""
    return fcntl.ioctl(network, _NS_GET_USERNS)


def is_roots(user_namespace: int) -> bool:
    """Did root make it? Nobody else has rights in it then, whoever its users are outside."""
    uid = ctypes.c_uint32()
    fcntl.ioctl(user_namespace, _NS_GET_OWNER_UID, uid)
    return uid.value == 0


def enter_network(network: int, uid: int | None = None) -> None:
    """Move this single-threaded process into a network namespace, and become `uid` on the way.

    A namespace that root made is entered as root, one that an ordinary user made as that user. Its owner is asked of
    the namespace, not of the process: bwrap moves on into a second user namespace, which has no rights over the
    network that the first one made. An engine's container may be in a user namespace that root made for it.
    """
    owner = owner_of(network)
    try:
        present = os.stat("/proc/self/ns/user")
        is_ours = os.path.samestat(os.fstat(owner), present) or (os.geteuid() == 0 and is_roots(owner))
        if is_ours:
            _check(_libc.setns(network, CLONE_NEWNET), "setns net")
        if uid is not None:
            become(uid)
        if not is_ours:
            _check(_libc.setns(owner, CLONE_NEWUSER), "setns user")
            _check(_libc.setns(network, CLONE_NEWNET), "setns net")
    finally:
        os.close(owner)


def make_network(as_root: bool) -> int:
    """Move this single-threaded process into a new network namespace, its own; a descriptor of it.

    An ordinary user gets a user namespace with it, in which that user is root and may set the network up.
    """
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(CLONE_NEWNET if as_root else CLONE_NEWNET | CLONE_NEWUSER), "unshare")
    if not as_root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def receive(channel: socket.socket, most_bytes: int, most_descriptors: int) -> tuple[bytes, list[int]]:
    """A message and its descriptors, which no program that this process starts inherits.

    Python 3.11 takes no heed of the flags that `socket.recv_fds` is given.
    """
    message, descriptors, _, _ = socket.recv_fds(channel, most_bytes, most_descriptors)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return message, descriptors


def move_into(namespace: int) -> None:
    """Move this single-threaded process into a namespace of any kind; into one of processes, what it forks from then
    on.
    """
    _check(_libc.setns(namespace, 0), "setns")


def move_into_owner_of(namespace: int) -> None:
    """Into the user namespace that owns another one, and so gain all rights there."""
    owner = owner_of(namespace)
    try:
        move_into(owner)
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
    """No capability is left, effective, permitted or to be inherited: a change of user keeps them where the former
    user was not that namespace's root.
    """
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, nothing), "capset")


def hide_memory() -> None:
    """Others of the same user cannot read or trace this process; what it executes is open to them again."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0)), "prctl")


def filter_calls(program: bytes) -> None:
    """Bind this process and its children to a system call filter, as `seccomp.build_filter` makes it."""
    code = ctypes.create_string_buffer(program, len(program))
    filter_ = _Filter(len(program) // 8, ctypes.addressof(code))
    unused = ctypes.c_ulong(0)
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    _check(_libc.prctl(_PR_SET_SECCOMP, mode, ctypes.byref(filter_), unused, unused), "prctl")


class _Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_void_p))


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
