"""Bounds that the kernel keeps for each process, where no control group does or beside it. Each raises OSError."""

from __future__ import annotations

import os
import resource
from contextlib import suppress

from services.executor.adapters.attempts import kernel
from services.executor.adapters.attempts.attempt_folder import AttemptSpec
from services.executor.adapters.runtimes.job_view import uid_of


def limit(kind: int, value: int) -> None:
    value = _within(value, resource.getrlimit(kind)[1])
    resource.setrlimit(kind, (value, value))


def limit_inside(pid: int, spec: AttemptSpec) -> None:
    """Bound the processes of a sandbox that has not begun, where no control group does. Raises OSError.

    Set on the sandbox's first process and not before it: since Linux 5.14 the kernel counts processes for
    each user namespace, but a limit that bwrap brought along would count all of the user's on this node. Root
    may lack CAP_SYS_RESOURCE (in containers it mostly does), so the job's own uid asks, in a fork.
    """
    if _kernel_version() < (5, 14):
        return
    if os.geteuid() != 0:
        _limit_processes(pid, spec.pids_limit)
        return
    helper = os.fork()
    if helper == 0:
        with suppress(OSError):
            kernel.become(uid_of(spec))
            _limit_processes(pid, spec.pids_limit)
            os._exit(0)
        os._exit(1)
    if os.waitpid(helper, 0)[1] != 0:
        raise PermissionError("the number of processes in the sandbox cannot be bounded")


def _limit_processes(pid: int, value: int) -> None:
    value = _within(value, resource.prlimit(pid, resource.RLIMIT_NPROC)[1])
    resource.prlimit(pid, resource.RLIMIT_NPROC, (value, value))


def _within(value: int, hard: int) -> int:
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _kernel_version() -> tuple[int, int]:
    major, minor, *_ = os.uname().release.split(".")
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
