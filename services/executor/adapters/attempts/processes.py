"""Processes of this node, read from /proc: who they are, who descends from whom, and ending them all."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PARENT, _START_TICKS, _STATE = 1, 19, 0  # fields of /proc/PID/stat, counted from behind the command's name


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when it is gone or only its zombie is
    left.
    """
    fields = _stat(pid)
    return None if fields is None or fields[_STATE] in (b"Z", b"X") else int(fields[_START_TICKS])


def name_of(pid: int) -> str:
    """The command's name as ps shows it; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


class Tree:
    """Who descends from whom, at the moment of the first question: one pass over /proc, however many are asked for.

    A whole pass: /proc/PID/task/TID/children exists only in kernels built for checkpointing.
    """

    def __init__(self) -> None:
        self._children: dict[int, list[int]] | None = None

    def below(self, ancestor: int) -> list[int]:
        """Every living or zombie process below `ancestor`, nearest first."""
        if self._children is None:
            self._children = _children()
        found = [ancestor]
        for pid in found:
            found.extend(self._children.get(pid, ()))
        return found[1:]


def descendants(ancestor: int) -> list[int]:
    """Every living or zombie process below `ancestor`, nearest first."""
    return Tree().below(ancestor)


def tagged(word: str) -> list[int]:
    """Living processes that have this `NAME=VALUE` in the environment they began with."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if word.encode() in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return [pid for pid in found if pid != os.getpid() and start_ticks(pid) is not None]


def signal_each(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end_descendants(limit_s: float = 10.0) -> bool:
    """Kill and reap all that descends from the calling process, which must be a child subreaper.

    Repeats until the kernel says that no child is left, because a process can fork between the look and the
    kill. False when some would not die within the limit (uninterruptible in the kernel).
    """
    deadline = time.monotonic() + limit_s
    while _reap_until_none_left():
        if time.monotonic() > deadline:
            return False
        signal_each(descendants(os.getpid()), signal.SIGKILL)
        time.sleep(0.001)
    return True


def resident_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes. Pages that they share count once for each: an upper bound, cheap to read."""
    return sum(_number_in(f"/proc/{pid}/statm", 1) for pid in pids) * _PAGE_BYTES


def proportional_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes with shared pages divided among their users: true, and dear to read."""
    return sum(_proportional_kib(pid) for pid in pids) * 1024


def threads_of(uid: int) -> int:
    """How many threads this user runs on the node now: what RLIMIT_NPROC counts."""
    count = 0
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _children() -> dict[int, list[int]]:
    children: dict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))) is not None:
            children[int(fields[_PARENT])].append(int(name))
    return children


def _stat(pid: int) -> list[bytes] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            content = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return content[content.rindex(b")") + 2 :].split()


def _number_in(path: str, index: int) -> int:
    try:
        return int(Path(path).read_bytes().split()[index])
    except (OSError, IndexError):
        return 0


def _proportional_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_bytes().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(b"Pss:"))


def _reap_until_none_left() -> bool:
    """Reap what is dead; True while a child remains."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True
