"""Bounds what the platform failed to keep: it waits on the node for a person, and not for ever."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from services.executor.adapters.workspaces.transfer import remove_tree

log = logging.getLogger(__name__)


def bound_unkept(folder: Path, limit_bytes: int, limit_s: float, now_s: float) -> None:
    """Deletes the oldest until all that is left is younger than `limit_s` and no larger than `limit_bytes` together.

    Args:
        folder: a folder for each attempt, dated by when it was set aside.
        now_s: since the epoch.
    """
    if not folder.is_dir():
        return
    found = sorted((path.lstat().st_ctime, path) for path in folder.iterdir())
    sizes = {path: _size_bytes(path) for _, path in found}
    total = sum(sizes.values())
    for set_aside_s, path in found:
        if total <= limit_bytes and now_s - set_aside_s <= limit_s:
            return
        log.warning("what was not kept is deleted", extra={"attempt_id": path.name, "size_bytes": sizes[path]})
        remove_tree(path)
        total -= sizes[path]


def _size_bytes(top: Path) -> int:
    total = 0
    for folder, _, names in os.walk(top, onerror=None):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError:  # too deep to name, or gone
                continue
    return total
