"""Looks into the file system of an image without being led out of it: its links mean paths inside."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_MOST_LINKS = 40
_MOST_BYTES = 1 << 20


def find_inside(root: Path, path: str) -> Path | None:
    """Where a path of the image is; None when it is not there, or when its links lead nowhere."""
    waiting, found, links = path.strip("/").split("/"), root, 0
    while waiting:
        part = waiting.pop(0)
        if part in ("", "."):
            continue
        if part == "..":
            found = found if found == root else found.parent
            continue
        place = found / part
        try:
            status = place.lstat()
        except OSError:
            return None
        if not stat.S_ISLNK(status.st_mode):
            found = place
            continue
        links += 1
        if links > _MOST_LINKS:
            return None
        target = os.readlink(place)
        if target.startswith("/"):
            found = root
        waiting = [*target.split("/"), *waiting]
    return found


def has_program(root: Path, path: str) -> bool:
    place = find_inside(root, path)
    if place is None:
        return False
    mode = place.lstat().st_mode
    return stat.S_ISREG(mode) and bool(mode & 0o111)


def lines_of(root: Path, path: str) -> list[str]:
    """Of a text file of the image; none when it is not there, or no file."""
    place = find_inside(root, path)
    if place is None or not stat.S_ISREG(place.lstat().st_mode):
        return []
    with place.open("rb") as file:
        return file.read(_MOST_BYTES).decode("utf-8", "replace").splitlines()
