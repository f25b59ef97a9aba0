"""What an attempt uses of its node: read from its control group where it has one, from its processes otherwise.

Only reading; who is read, and when, is the business of metering.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from services.executor.adapters.attempts import processes
from services.executor.adapters.runtimes.cgroup import folders_of

_TICKS_S = os.sysconf("SC_CLK_TCK")
_USER_TICKS, _SYSTEM_TICKS = 11, 12  # of /proc/PID/stat, counted from behind the command's name


class Reading(NamedTuple):
    """Counters since the attempt's start, and what it holds now; None for what is not to be had here."""

    cpu_s: float
    memory_bytes: int
    read_bytes: int | None
    written_bytes: int | None
    received_bytes: int | None
    sent_bytes: int | None


@dataclass(frozen=True, slots=True)
class Subject:
    """An attempt to read: its shim, and the first process of the job, which is 0 before there is one."""

    attempt_id: str
    shim_pid: int
    root_pid: int
    own_network: bool


class Meter:
    """Reads one attempt; remembers where its control group is, and which processes it had."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._folders = [folder for folder in _folders(subject) if folder.is_dir()]
        self._pids: list[int] = []

    def cpu_s(self) -> float:
        """The cheapest thing that tells whether anything happened since the last whole reading."""
        for folder in self._folders:
            if (found := _group_cpu_s(folder)) is not None:
                return found
        return sum(map(_cpu_s, self._pids))

    def read(self, tree: processes.Tree) -> Reading:
        self._pids = pids = tree.below(self.subject.shim_pid)
        memory = next(filter(None, map(_group_memory_bytes, self._folders)), None)
        disk = [amounts for pid in pids if (amounts := _disk_bytes(pid)) is not None]
        network = _network_bytes(self.subject.root_pid) if self.subject.own_network else None
        return Reading(
            cpu_s=self.cpu_s(),
            memory_bytes=processes.resident_bytes(pids) if memory is None else memory,
            read_bytes=sum(read for read, _ in disk) if disk else None,
            written_bytes=sum(written for _, written in disk) if disk else None,
            received_bytes=network[0] if network else None,
            sent_bytes=network[1] if network else None,
        )


def rates(before: Reading, now: Reading, passed_s: float) -> dict[str, float]:
    """What is shown of two readings: the CPU in percent of one core, bytes as they are or a second."""
    found = {
        "system/cpu_percent": max(0.0, now.cpu_s - before.cpu_s) / passed_s * 100,
        "system/memory_bytes": float(now.memory_bytes),
    }
    pairs = {
        "system/disk_read_bytes_per_s": (before.read_bytes, now.read_bytes),
        "system/disk_write_bytes_per_s": (before.written_bytes, now.written_bytes),
        "system/network_receive_bytes_per_s": (before.received_bytes, now.received_bytes),
        "system/network_send_bytes_per_s": (before.sent_bytes, now.sent_bytes),
    }
    for name, (old, new) in pairs.items():
        if old is not None and new is not None:
            # A process that ended takes its counter with it.
            found[name] = max(0, new - old) / passed_s
    return found


def _folders(subject: Subject) -> tuple[Path, ...]:
    """Where its control group may be; nowhere when the shim is gone."""
    with suppress(OSError, ValueError):
        return folders_of(subject.attempt_id, subject.shim_pid)
    return ()


def _group_cpu_s(folder: Path) -> float | None:
    with suppress(OSError, ValueError):
        return int((folder / "cpuacct.usage").read_text()) / 1e9
    with suppress(OSError, ValueError, StopIteration):
        lines = (folder / "cpu.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("usage_usec ")) / 1e6
    return None


def _group_memory_bytes(folder: Path) -> int | None:
    try:
        amounts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    for names in (("total_rss", "total_shmem"), ("anon", "shmem")):
        if names[0] in amounts:
            return sum(int(amounts.get(name, 0)) for name in names)
    return None


def _cpu_s(pid: int) -> float:
    with suppress(OSError, ValueError, IndexError):
        content = Path(f"/proc/{pid}/stat").read_bytes()
        fields = content[content.rindex(b")") + 2 :].split()
        # With what its children used that it has waited for.
        return sum(map(int, fields[_USER_TICKS : _SYSTEM_TICKS + 3])) / _TICKS_S
    return 0.0


def _disk_bytes(pid: int) -> tuple[int, int] | None:
    with suppress(OSError, ValueError, IndexError):
        amounts = dict(line.split(b": ") for line in Path(f"/proc/{pid}/io").read_bytes().splitlines())
        return int(amounts[b"read_bytes"]), int(amounts[b"write_bytes"])
    return None


def _network_bytes(pid: int) -> tuple[int, int] | None:
    """Received and sent by the interfaces of the process's own network namespace; None where it has loopback alone."""
    with suppress(OSError, ValueError, IndexError):
        rows = [line.split(":", 1) for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]]
        amounts = [(int(fields[0]), int(fields[8])) for fields in _outward(rows)]
        return (sum(received for received, _ in amounts), sum(sent for _, sent in amounts)) if amounts else None
    return None


def _outward(rows: Iterable[list[str]]) -> Iterable[list[str]]:
    return (rest.split() for name, rest in rows if name.strip() != "lo")
