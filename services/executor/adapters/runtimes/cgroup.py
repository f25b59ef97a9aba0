"""Hard limits of the kernel for one attempt, where this process may make control groups.

Both layouts: version 1 (a tree for each controller) and version 2 (one tree). The group is made below the
shim's own, so a limit around the whole platform still holds; in version 2 that is refused while processes
live beside it, and then it is made at the top of the tree. Without the right to make one there is no group at
all, and the shim samples memory instead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

_CONTROLLERS = ("memory", "pids", "cpu")
_CPU_PERIOD_US = 100_000


class Limits(NamedTuple):
    memory_bytes: int | None
    cpu_count: float
    pids: int


class Cgroup:
    """The group of one attempt: a folder for each controller, all the same one in version 2."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders
        self._unified = (folders["memory"] / "cgroup.controllers").exists()

    @classmethod
    def create(cls, attempt_id: str, limits: Limits) -> Self | None:
        """None where this process may not. A group left by a killed shim of the same attempt is taken
        over.
        """
        for parents in _possible_parents():
            folders = {name: parent / f"nabla-{attempt_id}" for name, parent in parents.items()}
            try:
                for folder in folders.values():
                    folder.mkdir(exist_ok=True)
                group = cls(folders)
                group._set(limits)
            except OSError:
                remove_folders(folders.values())
                continue
            return group
        return None

    def add(self, pid: int) -> None:
        """Put a process, and all that it starts from now on, into the group. One that is gone is no error.

        The first such move on a node waits for the kernel (RCU: 11 to 16 ms measured), those close behind it
        do not. So the shim moves its child while that builds the walls, and not the child itself before it.
        """
        with suppress(ProcessLookupError):
            for folder in set(self._folders.values()):
                (folder / "cgroup.procs").write_text(str(pid))

    def oom_kills(self) -> int:
        """How many processes the kernel has killed here for want of memory."""
        return self._memory_field("memory.events" if self._unified else "memory.oom_control", "oom_kill")

    def resident_bytes(self) -> int:
        """Memory that the attempt holds, the page cache left out: reading a large file is no use of
        memory.
        """
        names = ("anon", "shmem") if self._unified else ("total_rss", "total_shmem")
        return sum(self._memory_field("memory.stat", name) for name in names)

    def peak_bytes(self) -> int:
        """The most that the attempt ever held, the page cache with it; 0 where the kernel does not say."""
        name = "memory.peak" if self._unified else "memory.max_usage_in_bytes"
        with suppress(OSError, ValueError):
            return int((self._folders["memory"] / name).read_text())
        return 0

    def remove(self) -> None:
        """Needs every process of the group gone; a killed one leaves it a moment after it was reaped."""
        deadline = time.monotonic() + 1.0
        while not remove_folders(self._folders.values()) and time.monotonic() < deadline:
            time.sleep(0.005)

    def _set(self, limits: Limits) -> None:
        quota_us = max(1000, int(limits.cpu_count * _CPU_PERIOD_US))
        self._write("pids", "pids.max", str(limits.pids))
        if self._unified:
            self._write("cpu", "cpu.max", f"{quota_us} {_CPU_PERIOD_US}")
        else:
            self._write("cpu", "cpu.cfs_period_us", str(_CPU_PERIOD_US))
            self._write("cpu", "cpu.cfs_quota_us", str(quota_us))
        if limits.memory_bytes is not None:
            self._set_memory(int(limits.memory_bytes))

    def _set_memory(self, size_bytes: int) -> None:
        """Swap is refused as well where the kernel counts it: it would only make the end slow. And the kernel ends
        all of the group: a parent whose worker was killed alone may wait for it for ever.
        """
        if self._unified:
            self._write("memory", "memory.max", str(size_bytes))
            # The last one since Linux 4.19: without it the shim ends what the kernel left, a moment later.
            for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
                with suppress(FileNotFoundError):
                    self._write("memory", name, value)
            return
        self._write("memory", "memory.limit_in_bytes", str(size_bytes))
        with suppress(FileNotFoundError):
            self._write("memory", "memory.memsw.limit_in_bytes", str(size_bytes))

    def _write(self, controller: str, name: str, value: str) -> None:
        path = self._folders[controller] / name
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # not O_CREAT: a missing file is an answer
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)

    def _memory_field(self, name: str, key: str) -> int:
        try:
            lines = (self._folders["memory"] / name).read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.split()[0] == key), 0)


def members(attempt_id: str) -> set[int]:
    """The processes in the group of an attempt."""
    found = set[int]()
    for folder in set(folders_of(attempt_id)):
        with suppress(OSError):
            found.update(int(line) for line in (folder / "cgroup.procs").read_text().split())
    return found


def join_groups_of(pid: int) -> None:
    """Move the calling process into the groups of another one, where they differ. Raises OSError."""
    mounts, own = dict(_mounts()), dict(_groups_of("self"))
    for controllers, path in _groups_of(pid):
        mount = next((mounts[name] for name in controllers.split(",") if name in mounts), None)
        if mount is not None and own.get(controllers) != path:
            (mount / path.lstrip("/") / "cgroup.procs").write_text("0")


def remove_leftover(attempt_id: str) -> bool:
    """Remove the group of an attempt whose shim was killed; False while processes are in it."""
    return remove_folders(folders_of(attempt_id))


def folders_of(attempt_id: str, beside: int | str = "self") -> tuple[Path, ...]:
    """Where the group of an attempt may be, made by a shim in the same groups as process `beside`."""
    places = _possible_parents(prepare=False, process=beside)
    return tuple(parent / f"nabla-{attempt_id}" for parents in places for parent in parents.values())


def remove_folders(folders: Iterable[Path]) -> bool:
    """Remove groups; False while one of them still holds processes."""
    removed = True
    for folder in set(folders):
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            removed = False
    return removed


def _possible_parents(prepare: bool = True, process: int | str = "self") -> Iterator[Mapping[str, Path]]:
    """Folders to make the group in, for each controller; the best first."""
    own = {name: path for names, path in _groups_of(process) for name in names.split(",")}
    mounts = dict(_mounts())
    if all(name in mounts and name in own for name in _CONTROLLERS):
        yield {name: mounts[name] / own[name].lstrip("/") for name in _CONTROLLERS}
        return
    if "" not in mounts or "" not in own:
        return
    for parent in dict.fromkeys((mounts[""] / own[""].lstrip("/"), mounts[""])):
        if not prepare or _delegate(parent):
            yield dict.fromkeys(_CONTROLLERS, parent)


def _delegate(parent: Path) -> bool:
    """Hand the controllers of version 2 on to the groups below; refused while `parent` holds processes."""
    try:
        (parent / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in _CONTROLLERS))
    except OSError:
        return False
    return True


def _groups_of(process: int | str) -> Iterator[tuple[str, str]]:
    """(controllers, path in their tree) of a process; controllers is "" for version 2."""
    for line in Path(f"/proc/{process}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        yield controllers, path


def _mounts() -> Iterator[tuple[str, Path]]:
    """(controller or other option, where its tree is mounted); the controller is "" for version 2."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, options, *_ = line.split()
        if kind == "cgroup2":
            yield "", Path(target)
        elif kind == "cgroup":
            yield from ((name, Path(target)) for name in options.split(","))
