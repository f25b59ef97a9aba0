"""Finds and ends what an installation left on this machine: processes without a supervisor, shims, control groups.

A supervisor that is killed takes its children along (parent death signal), but they need a moment, and Ray's own
processes have children of their own that notice later still. So both `down` and the next `up` look for them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from infra.local.installation import InstallationError
from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.adapters.runtimes import cgroup

# Everything that the supervisor starts carries this variable with the installation's folder.
MARK = "NABLA_SUPERVISED"
LOOK_S = 0.05


def marked(home: Path) -> dict[str, str]:
    """The environment that makes a process one of this installation's."""
    return {MARK: str(home)}


def processes_of(home: Path) -> list[int]:
    """All processes of this installation but this one and the jobs: those have an environment built from nothing."""
    mark = f"{MARK}={home}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


def end_processes(home: Path, patience_s: float, limit_s: float = 30.0) -> None:
    """Ends the processes, not the jobs, which outlive them on purpose.

    Returns when none is left: those that do not end by themselves within `patience_s` are killed.

    Raises:
        InstallationError: the kernel has not let go of them for `limit_s` since.
    """
    began = time.monotonic()
    while found := processes_of(home):
        passed_s = time.monotonic() - began
        if passed_s > patience_s + limit_s:
            raise InstallationError(
                f"These processes do not end, although they were killed: {' '.join(map(str, found))}. "
                f"`ps -o pid,stat,wchan,cmd {' '.join(map(str, found))}` shows what in the kernel holds them."
            )
        if passed_s > patience_s:
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_S)


def living_attempts(attempts: Path) -> list[str]:
    """The attempts that run below this folder."""
    return [path.name for path in attempts.glob("*") if AttemptFolder(path).shim_is_alive()]


def end_attempts(attempts: Path, patience_s: float = 3.0) -> None:
    """Kills the shims that are left, with each its sandbox, and removes their control groups."""
    left: list[tuple[Path, ...]] = []
    for path in attempts.glob("*"):
        shim = AttemptFolder(path).read_shim()
        if shim and shim.is_alive():
            with contextlib.suppress(OSError):
                left.append(cgroup.folders_of(path.name, shim.pid))
                os.kill(shim.pid, signal.SIGKILL)
    deadline = time.monotonic() + patience_s
    while left and time.monotonic() < deadline:
        # A group cannot go before the kernel is done with the last of its processes.
        left = [folders for folders in left if not cgroup.remove_folders(folders)]
        time.sleep(LOOK_S if left else 0.0)
