"""Remembers file hashes, so that an unchanged tree costs one stat a file.

A hash is believed while path, size, modification time and inode are the same. A file changed within the last two
seconds is not remembered: it could change again without its time showing it.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from nabla import jsonfile, paths
from nabla.errors import BadConfig, WorkspaceError
from nabla.manifest import hash_file
from nabla.packing.tree import Entry
from nabla.progress import Progress, silent

SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class ArchiveFacts:
    """What the archive of a tree looks like from outside."""

    size_bytes: int
    md5: str
    sha256: str


class HashCache:
    """The cache of one folder. A damaged or unwritable file costs time, never correctness."""

    def __init__(self, root: Path, folder: Path | None = None) -> None:
        self._root = root
        name = hashlib.sha256(str(root).encode()).hexdigest()[:32]
        self._path: Path | None = None
        data: dict[str, object] = {}
        with contextlib.suppress(BadConfig):
            self._path = (folder or paths.cache_dir() / "hashes") / f"{name}.json"
            data = jsonfile.read(self._path)
        self._files = _table(data.get("files"))
        self._archive = _table(data.get("archive"))
        self._kept: dict[str, list[object]] = {}

    def known(self, entry: Entry) -> str | None:
        """The file's SHA-256, when it has not changed since it was last hashed."""
        row = self._files.get(entry.path)
        return str(row[3]) if row and row[:3] == [entry.size_bytes, entry.mtime_ns, entry.inode] else None

    def sha256(self, entry: Entry, progress: Progress = silent) -> str:
        sha256 = self.known(entry) or self._hash(entry, progress)
        if time.time_ns() - entry.mtime_ns > SETTLED_NS:
            self._kept[entry.path] = [entry.size_bytes, entry.mtime_ns, entry.inode, sha256]
        return sha256

    def archive(self, digest: str) -> ArchiveFacts | None:
        row = self._archive.get(digest)
        return ArchiveFacts(int(str(row[0])), str(row[1]), str(row[2])) if row and len(row) == 3 else None

    def save(self, digest: str, facts: ArchiveFacts) -> None:
        row = [facts.size_bytes, facts.md5, facts.sha256]
        if self._path is None or (self._kept == self._files and self._archive == {digest: row}):
            return
        with contextlib.suppress(BadConfig):
            jsonfile.write(self._path, {"root": str(self._root), "files": self._kept, "archive": {digest: row}})

    def _hash(self, entry: Entry, progress: Progress) -> str:
        try:
            return hash_file(self._root / entry.path, progress)[2]
        except OSError as error:
            raise WorkspaceError(
                f"Cannot read {entry.path!r}: {error.strerror}.",
                "Make it readable, or name it in a .nablaignore file.",
            ) from error


def _table(data: object) -> dict[str, list[object]]:
    rows = data.items() if isinstance(data, dict) else ()
    return {str(key): row for key, row in rows if isinstance(row, list)}
