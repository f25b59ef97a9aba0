"""Brings the parts together: scan, hash, and upload when the server does not know the tree yet."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from functools import cached_property
from pathlib import Path

from nabla.errors import WorkspaceError
from nabla.hints import readable_size
from nabla.manifest import LocalFile, Manifest
from nabla.objects import Fileset
from nabla.packing import archive
from nabla.packing.archive import ARCHIVE, ChangedMeanwhile, tree_digest
from nabla.packing.hashes import ArchiveFacts, HashCache
from nabla.packing.origin import describe_origin
from nabla.packing.tree import FOLDER, LINK, Entry, Tree, scan
from nabla.progress import Progress, Stages, unseen
from nabla.resources.filesets import Filesets

ATTEMPTS = 3
MAX_BYTES = 20_000_000_000


class Workspace:
    """A scanned folder. What it costs to go on can be asked before anything is read or sent."""

    def __init__(self, tree: Tree, cache_folder: Path | None = None) -> None:
        self.tree = tree
        self._hashes: dict[str, str] | None = None
        self._cache_folder = cache_folder
        self._cache = HashCache(tree.root, cache_folder)
        new = [entry for entry in tree.entries if _is_file(entry) and self._cache.known(entry) is None]
        self.new_file_count = len(new)
        self.new_size_bytes = sum(entry.size_bytes for entry in new)

    @cached_property
    def origin(self) -> dict[str, str]:
        return describe_origin(self.tree.root)

    @property
    def hashes(self) -> dict[str, str]:
        return self._read(unseen)

    @cached_property
    def digest(self) -> str:
        return tree_digest(self.tree.entries, self.hashes)

    def upload(self, filesets: Filesets, project: str, stages: Stages = unseen) -> Fileset:
        """The sealed file set of this tree. A file that changes meanwhile starts it over, three times at most."""
        now = self
        for _ in range(ATTEMPTS - 1):
            try:
                return now._upload(filesets, project, stages)
            except ChangedMeanwhile:
                now = Workspace(scan(self.tree.root), self._cache_folder)
        return now._upload(filesets, project, stages)

    def _upload(self, filesets: Filesets, project: str, stages: Stages) -> Fileset:
        self._read(stages)
        with tempfile.TemporaryDirectory(prefix="nabla-") as folder:
            path = Path(folder, ARCHIVE)
            remembered = self._cache.archive(self.digest)
            if remembered is not None:
                grant = filesets.open("workspace", project, self._manifest(path, remembered))
                if not grant.uploads:
                    fileset = filesets.finish(grant, ())
                    self._cache.save(self.digest, remembered)
                    return fileset
            # Opened again with the facts as written: another zlib may pack the same tree into other bytes.
            written = self._write(path, stages)
            fileset = filesets.upload("workspace", project, self._manifest(path, written), stages)
        self._cache.save(self.digest, written)
        return fileset

    def _read(self, stages: Stages) -> dict[str, str]:
        """Hashes the files, once."""
        if self._hashes is None:
            told = stages("Reading", self.new_size_bytes)
            self._hashes = {entry.path: self._hash(entry, told) for entry in self.tree.entries}
        return self._hashes

    def _write(self, path: Path, stages: Stages) -> ArchiveFacts:
        told = stages("Packing", sum(entry.size_bytes for entry in self.tree.entries))
        try:
            return archive.write(path, self.tree.root, self.tree.entries, self.hashes, told)
        except OSError as error:
            raise WorkspaceError(
                f"Cannot pack the folder into {path.parent}: {error.strerror}.",
                "Make room there, or set TMPDIR to a folder with more.",
            ) from error

    def _manifest(self, path: Path, facts: ArchiveFacts) -> Manifest:
        file = LocalFile(ARCHIVE, path, facts.size_bytes, facts.md5, facts.sha256)
        return Manifest(self.digest, (file,))

    def _hash(self, entry: Entry, progress: Progress) -> str:
        if entry.mode == LINK:
            return hashlib.sha256(entry.target.encode("utf-8", "surrogateescape")).hexdigest()
        return hashlib.sha256(b"").hexdigest() if entry.mode == FOLDER else self._cache.sha256(entry, progress)


def pack(folder: Path, cache_folder: Path | None = None) -> Workspace:
    """Scans a folder; nothing is read or sent yet. Raises WorkspaceError, also for one that is larger than may be."""
    if not folder.is_dir():
        raise WorkspaceError(f"{str(folder)!r} is not a folder.", "Run it in the folder that holds your code.")
    tree = scan(folder)
    size_bytes, most_bytes = sum(entry.size_bytes for entry in tree.entries), max_bytes()
    if size_bytes > most_bytes:
        raise WorkspaceError(
            f"The folder has {readable_size(size_bytes)}; {readable_size(most_bytes)} is the most for a workspace.",
            "Name large files in .nablaignore, and put data into /storage or a bucket.",
        )
    return Workspace(tree, cache_folder)


def max_bytes() -> int:
    """The installation's `workspace_bytes`, where it was changed: told by the variable of that name."""
    with contextlib.suppress(ValueError):
        return int(os.environ.get("NABLA_WORKSPACE_BYTES", MAX_BYTES))
    return MAX_BYTES


def _is_file(entry: Entry) -> bool:
    return entry.mode not in (LINK, FOLDER)
