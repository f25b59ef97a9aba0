"""A small system call filter for sandboxes and containers: the doors that a job without any capability could still try.

bwrap takes away capabilities and setuid; what remains open to every user are user namespaces (a new set of
capabilities over a large part of the kernel), the kernel's key ring, which no namespace divides, and a few
calls known for holes. They answer EPERM, so programs fall back; clone3 answers ENOSYS, because its flags lie
in memory that a filter cannot read, and libc then uses clone.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24  # offsets in struct seccomp_data
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_CLONE_NEWUSER = 0x10000000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_CLONE3 = 435
_X32 = 0x40000000

# name: numbers on (x86_64, aarch64)
_REFUSED = {
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "setns": (308, 268),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
}
_NEW_NAMESPACE = {"clone": (56, 220), "unshare": (272, 97)}
_IOCTL = (16, 29)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def build_filter(machine: str | None = None) -> bytes | None:
    """The filter as `bwrap --seccomp` reads it; None on a kind of machine that it does not know."""
    known = _MACHINES.get(machine or os.uname().machine)
    if known is None:
        return None
    column, architecture = known
    refused = _fail(errno.EPERM)
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_EQUAL, architecture, 1, 0),
        refused,
        _instruction(_LOAD, _NUMBER),
        _instruction(_JUMP_GREATER, _X32, 0, 1),
        refused,
        _instruction(_JUMP_EQUAL, _CLONE3, 0, 1),
        _fail(errno.ENOSYS),
    ]
    for numbers in _REFUSED.values():
        program += [_instruction(_JUMP_EQUAL, numbers[column], 0, 1), refused]
    for numbers in _NEW_NAMESPACE.values():
        program += _refuse_argument(numbers[column], _ARGUMENT_0, _JUMP_SET, (_CLONE_NEWUSER,))
    program += _refuse_argument(_IOCTL[column], _ARGUMENT_1, _JUMP_EQUAL, (_TIOCSTI, _TIOCLINUX))
    return b"".join([*program, _instruction(_RETURN, _ALLOW)])


def oci_profile() -> dict[str, Any]:
    """The same filter as container engines read it; of system calls in another machine's numbers there are none."""
    refused = {"action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM}
    new_user = {"index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": _CLONE_NEWUSER, "valueTwo": _CLONE_NEWUSER}
    into_terminals = [{"index": 1, "op": "SCMP_CMP_EQ", "value": request} for request in (_TIOCSTI, _TIOCLINUX)]
    rules: list[dict[str, Any]] = [
        {"names": list(_REFUSED), **refused},
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
        {"names": list(_NEW_NAMESPACE), **refused, "args": [new_user]},
        *({"names": ["ioctl"], **refused, "args": [argument]} for argument in into_terminals),
    ]
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}


def _refuse_argument(number: int, argument: int, test: int, values: tuple[int, ...]) -> list[bytes]:
    """Refuse one call where an argument matches; it is answered here, so what follows keeps the call's
    number.
    """
    body = [_instruction(_LOAD, argument)]
    for value in values:
        body += [_instruction(test, value, 0, 1), _fail(errno.EPERM)]
    body.append(_instruction(_RETURN, _ALLOW))
    return [_instruction(_JUMP_EQUAL, number, 0, len(body)), *body]


def _fail(number: int) -> bytes:
    return _instruction(_RETURN, _FAIL | number)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
