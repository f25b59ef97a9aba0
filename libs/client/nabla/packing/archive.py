"""Writes a tree as `workspace.tar.gz`: the same tree gives the same bytes, whenever and wherever it is packed."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from nabla.errors import WorkspaceError
from nabla.manifest import hash_file
from nabla.packing.hashes import ArchiveFacts
from nabla.packing.tree import FOLDER, LINK, Entry
from nabla.progress import Progress, silent

ARCHIVE = "workspace.tar.gz"
# Mostly text, mostly sent over a fast network: the quickest level wins.
COMPRESSION = 1


class ChangedMeanwhile(WorkspaceError):
    """A file is not what it was when it was hashed."""


def tree_digest(entries: list[Entry], hashes: Mapping[str, str]) -> str:
    """SHA-256 over the sorted lines "path NUL mode NUL sha256 LF"; a link's hash is that of its target's name."""
    lines = sorted(f"{e.path}\0{e.mode}\0{hashes[e.path]}\n".encode("utf-8", "surrogateescape") for e in entries)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def write(
    path: Path, root: Path, entries: list[Entry], hashes: Mapping[str, str], progress: Progress = silent
) -> ArchiveFacts:
    """Streams the tree into `path`. Raises ChangedMeanwhile when a file's content no longer has its hash."""
    with path.open("wb") as raw, _tar(raw) as tar:
        for entry in sorted(entries, key=lambda entry: entry.path):
            _write_entry(tar, root, entry, hashes[entry.path], progress)
    return ArchiveFacts(*hash_file(path))


@contextlib.contextmanager
def _tar(raw: BinaryIO) -> Iterator[tarfile.TarFile]:
    """Compressed, with neither name nor time in gzip's own header."""
    packed = gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0)
    with packed, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        yield tar


def _write_entry(tar: tarfile.TarFile, root: Path, entry: Entry, sha256: str, progress: Progress) -> None:
    header = _header(entry)
    if not header.isreg():
        tar.addfile(header)
        return
    try:
        stream = (root / entry.path).open("rb")
    except OSError as error:
        raise _changed(entry, error) from error
    with stream:
        reader = _HashingReader(stream, entry, progress)
        tar.addfile(header, reader)
        if reader.sha256.hexdigest() != sha256 or reader.read(1):
            raise _changed(entry)


def _changed(entry: Entry, error: OSError | None = None) -> ChangedMeanwhile:
    why = f": {error.strerror}" if error else ""
    return ChangedMeanwhile(f"{entry.path!r} changed while the folder was packed{why}.", _AGAIN)


_AGAIN = "Run it again when nothing writes into the folder, or name the file in .nablaignore."


def _header(entry: Entry) -> tarfile.TarInfo:
    """No times, owners or finer rights: they differ between machines and mean nothing in the job."""
    header = tarfile.TarInfo(entry.path)
    header.mode = int(entry.mode[-3:], 8)
    if entry.mode == LINK:
        header.type, header.linkname, header.mode = tarfile.SYMTYPE, entry.target, 0o777
    elif entry.mode == FOLDER:
        header.type, header.mode = tarfile.DIRTYPE, 0o755
    else:
        header.size = entry.size_bytes
    return header


class _HashingReader(io.RawIOBase):
    """Hashes what passes through on its way into the archive.

    Its own errors are not those of the archive's disk, which may be full.
    """

    def __init__(self, stream: BinaryIO, entry: Entry, progress: Progress) -> None:
        self._stream = stream
        self._entry = entry
        self._progress = progress
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._stream.read(size)
        except OSError as error:
            raise _changed(self._entry, error) from error
        if size > 0 and not data and self._stream.tell() < self._entry.size_bytes:
            raise _changed(self._entry)
        self.sha256.update(data)
        self._progress(len(data))
        return data
