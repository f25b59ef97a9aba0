"""Which shims hold a network that several share: the ranks of one gang on one node.

A network lives as long as a process holds a descriptor of it, and no longer: so nothing is left of it when all its
shims are gone, however they went. A shim that comes later takes it from one that lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from services.executor.adapters.attempts import processes


def join_or_make(folder: Path, name: str, make: Callable[[], int]) -> int:
    """A descriptor of the network of this name, made now when nobody holds it."""
    with _locked(folder):
        holders = _living(folder, name)
        network = next(filter(None, map(_taken_over, holders)), None)
        if network is None:
            network = make()
        me = {"pid": os.getpid(), "start_ticks": processes.start_ticks(os.getpid()), "descriptor": network}
        _file(folder, name).write_text(json.dumps([*holders, me]))
        return network


def leave(folder: Path, name: str, last: Callable[[], None]) -> None:
    """This process holds it no longer; `last` is called when nobody does."""
    with _locked(folder):
        holders = [holder for holder in _living(folder, name) if holder["pid"] != os.getpid()]
        if holders:
            _file(folder, name).write_text(json.dumps(holders))
        else:
            for path in folder.glob(f"{name}.*"):
                path.unlink()
            last()


def forget_the_dead(folder: Path) -> None:
    """Remove what killed shims have left here."""
    if not folder.is_dir():
        return
    with _locked(folder):
        for path in folder.glob("*.json"):
            if not _living(folder, path.stem):
                for left in folder.glob(f"{path.stem}.*"):
                    left.unlink()


def _taken_over(holder: dict[str, Any]) -> int | None:
    with contextlib.suppress(OSError):
        path = f"/proc/{holder['pid']}/fd/{holder['descriptor']}"
        if os.readlink(path).startswith("net:"):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return None


def _living(folder: Path, name: str) -> list[dict[str, Any]]:
    try:
        holders: list[dict[str, Any]] = json.loads(_file(folder, name).read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    return [holder for holder in holders if processes.start_ticks(holder["pid"]) == holder["start_ticks"]]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
