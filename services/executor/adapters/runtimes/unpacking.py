"""Unpacks a workspace archive into an attempt's folder, believing nothing that the archive says.

No absolute path, no `..`, no link that leaves the tree, no device, no file twice, bounded in size and count. Files
are created, never replaced, and links are made last, so that no file is ever written through one.
"""

from __future__ import annotations

import gzip
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from libs.common.errors import NablaError

MAX_FILES = 200_000
MAX_BYTES = 64 << 30
MAX_DEPTH = 200
CHUNK_BYTES = 1024 * 1024
MAX_ZIP_LIST_BYTES = 64 << 20
MAX_LINK_BYTES = 4096
# The end of a zip with the longest comment, and the two records that a large one has before it.
_ZIP_END_BYTES = 65_557 + 76


class BadArchive(NablaError):
    """The archive is broken, or holds what a workspace must not."""


def unpack(source: IO[bytes], target: Path, max_files: int = MAX_FILES, max_bytes: int = MAX_BYTES) -> int:
    """Unpacks a tar, tar.gz or zip, which its first bytes tell, into an empty or missing folder; the number of files.

    Raises:
        BadArchive: the text says which entry and why; what was unpacked so far is left behind.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    tree = _Tree(target, max_files, max_bytes)
    try:
        magic = source.read(4)
        source.seek(0)
        if magic[:2] == b"PK":
            _unpack_zip(source, tree)
        else:
            with _Unzipped(source) if magic[:2] == b"\x1f\x8b" else _Plain(source) as plain:
                _unpack_tar(plain, tree)
        tree.link()
    except _BROKEN as error:
        raise BadArchive(f"it is broken: {error}") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise BadArchive(f"it names {Path(error.filename).name!r} twice") from error
    return tree.count


_BROKEN = (
    *(tarfile.TarError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, EOFError, ValueError, IndexError),
    *(OverflowError, NotImplementedError, RuntimeError, struct.error, UnicodeDecodeError),
)


class _Tree:
    """What was unpacked so far. Links are made last, so that no file is ever written through one."""

    def __init__(self, target: Path, max_files: int, max_bytes: int) -> None:
        self._target = target
        self._max_files, self._max_bytes = max_files, max_bytes
        self._left = max_bytes
        self._links: list[tuple[Path, str]] = []
        self.count = 0

    def count_in(self, size_bytes: int) -> None:
        self.count += 1
        if self.count > self._max_files:
            raise BadArchive(f"it holds more than {self._max_files} files")
        self._left -= size_bytes
        if self._left < 0 or size_bytes < 0:
            raise BadArchive(f"it unpacks to more than {self._max_bytes} bytes")

    def add_folder(self, name: str) -> None:
        (self._target / inner_path(name)).mkdir(mode=0o755, parents=True, exist_ok=True)

    def add_link(self, name: str, destination: str) -> None:
        ends = posixpath.normpath(posixpath.join(posixpath.dirname(name), destination))
        if destination.startswith("/") or ends == ".." or ends.startswith("../") or "\0" in destination:
            raise BadArchive(f"the link {name!r} leads out of it")
        self._links.append((self._place(name), destination))

    def add_file(self, name: str, content: IO[bytes], size_bytes: int, executable: bool) -> None:
        mode = 0o755 if executable else 0o644
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self._place(name), flags, mode), "wb") as file:
            while chunk := content.read(CHUNK_BYTES):
                size_bytes -= len(chunk)
                if size_bytes < 0:
                    raise BadArchive(f"{name!r} is larger than it says")
                file.write(chunk)

    def link(self) -> None:
        for path, destination in self._links:
            path.symlink_to(destination)

    def _place(self, name: str) -> Path:
        path = self._target / inner_path(name)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        return path


def _unpack_tar(plain: IO[bytes] | gzip.GzipFile, tree: _Tree) -> None:
    with tarfile.TarFile(fileobj=plain) as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # or it would remember every one
            tree.count_in(member.size)
            if member.isdir():
                tree.add_folder(member.name)
            elif member.issym():
                tree.add_link(member.name, member.linkname)
            elif member.isreg():
                content = archive.extractfile(member)
                assert content, "a regular file has content"
                tree.add_file(member.name, content, member.size, bool(member.mode & 0o100))
            else:
                raise BadArchive(f"{member.name!r} is neither a file, a folder nor a symbolic link")


def _unpack_zip(source: IO[bytes], tree: _Tree) -> None:
    """Its list of entries is read into memory, so its size is looked at first."""
    if _list_bytes(source) > MAX_ZIP_LIST_BYTES:
        raise BadArchive(f"its list of files is larger than {MAX_ZIP_LIST_BYTES} bytes")
    source.seek(0)
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            tree.count_in(member.file_size)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                tree.add_folder(member.filename)
            elif kind == stat.S_IFLNK:
                if member.file_size > MAX_LINK_BYTES:
                    raise BadArchive(f"the link {member.filename!r} is too long")
                tree.add_link(member.filename, archive.read(member).decode())
            elif kind in (0, stat.S_IFREG):
                with archive.open(member) as content:
                    executable = bool(member.external_attr >> 16 & 0o100)
                    tree.add_file(member.filename, content, member.file_size, executable)
            else:
                raise BadArchive(f"{member.filename!r} is neither a file, a folder nor a symbolic link")


def _list_bytes(source: IO[bytes]) -> int:
    """The size of a zip's list of entries, as its end says; one beyond 4 GB says it in a record of its own."""
    length = source.seek(0, os.SEEK_END)
    source.seek(max(0, length - _ZIP_END_BYTES))
    end = source.read()
    at = end.rfind(b"PK\5\6")
    if at < 0 or len(end) < at + 22:
        raise BadArchive("it is broken: a zip without an end")
    size = int.from_bytes(end[at + 12 : at + 16], "little")
    far = end.rfind(b"PK\6\6", 0, at)
    return int.from_bytes(end[far + 40 : far + 48], "little") if size == 0xFFFFFFFF and far >= 0 else size


class _Unzipped(gzip.GzipFile):
    """What tarfile reads. It takes a header of any claimed size into memory, and a gzipped megabyte can hold one of a
    gigabyte; so nobody gets more than a chunk at once.
    """

    def __init__(self, source: IO[bytes]) -> None:
        super().__init__(fileobj=source, mode="rb")

    def read(self, size: int | None = -1) -> bytes:
        return super().read(_within(size))


class _Plain:
    """As `_Unzipped`, of what is not compressed."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self.seek, self.tell, self.close = source.seek, source.tell, source.close

    def read(self, size: int = -1) -> bytes:
        return self._source.read(_within(size))

    def __enter__(self) -> IO[bytes]:
        return self  # type: ignore[return-value]  # what tarfile needs of a file

    def __exit__(self, *_: object) -> None:
        return


def _within(size: int | None) -> int:
    if size is None or not 0 <= size <= CHUNK_BYTES:
        raise BadArchive(f"a header in it claims {size} bytes")
    return size


def inner_path(name: str) -> Path:
    """A path below a folder, from text that others wrote.

    Raises:
        BadArchive: it would leave the folder.
    """
    parts = PurePosixPath(name).parts
    if not name or "\0" in name or name.startswith("/") or ".." in parts:
        raise BadArchive(f"{name!r} is not a path inside of it")
    if len(parts) > MAX_DEPTH:
        raise BadArchive(f"{name[:80]!r}... is nested deeper than {MAX_DEPTH} folders")
    return Path(*parts)
