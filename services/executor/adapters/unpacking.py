"""Unpacks a workspace archive into an attempt's folder, believing nothing that the archive says.

No absolute path, no `..`, no link that leaves the tree, no device, no file twice, bounded in size and count. Files
are created, never replaced, and links are made last, so that no file is ever written through one.
"""

from __future__ import annotations

import gzip
import os
import posixpath
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from libs.common.errors import NablaError

MAX_FILES = 200_000
MAX_BYTES = 64 << 30
MAX_DEPTH = 200
CHUNK_BYTES = 1024 * 1024


class BadArchive(NablaError):
    """The archive is broken, or holds what a workspace must not."""


def unpack(source: IO[bytes], target: Path, max_files: int = MAX_FILES, max_bytes: int = MAX_BYTES) -> int:
    """Unpacks a tar.gz into an empty or missing folder; the number of files.

    Raises:
        BadArchive: the text says which entry and why; what was unpacked so far is left behind.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    links: list[tuple[Path, str]] = []
    left = max_bytes
    count = 0
    try:
        with _Unzipped(source) as plain, tarfile.TarFile(fileobj=plain) as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # or it would remember every one
                count += 1
                if count > max_files:
                    raise BadArchive(f"it holds more than {max_files} files")
                left -= member.size
                if left < 0 or member.size < 0:
                    raise BadArchive(f"it unpacks to more than {max_bytes} bytes")
                _unpack_member(archive, member, target, links)
        for path, destination in links:
            path.symlink_to(destination)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, IndexError, OverflowError) as error:
        raise BadArchive(f"it is broken: {error}") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise BadArchive(f"it names {Path(error.filename).name!r} twice") from error
    return count


class _Unzipped(gzip.GzipFile):
    """What tarfile reads. It takes a header of any claimed size into memory, and a gzipped megabyte can hold one of a
    gigabyte; so nobody gets more than a chunk at once.
    """

    def __init__(self, source: IO[bytes]) -> None:
        super().__init__(fileobj=source, mode="rb")

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= CHUNK_BYTES:
            raise BadArchive(f"a header in it claims {size} bytes")
        return super().read(size)


def _unpack_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path, links: list[tuple[Path, str]]
) -> None:
    path = target / inner_path(member.name)
    if member.isdir():
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        return
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if member.issym():
        links.append((path, _inner_link(member)))
    elif member.isreg():
        _write_file(archive, member, path)
    else:
        raise BadArchive(f"{member.name!r} is neither a file, a folder nor a symbolic link")


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


def _inner_link(member: tarfile.TarInfo) -> str:
    ends = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
    if member.linkname.startswith("/") or ends == ".." or ends.startswith("../"):
        raise BadArchive(f"the link {member.name!r} leads out of it")
    return member.linkname


def _write_file(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    content = archive.extractfile(member)
    assert content, "a regular file has content"
    mode = 0o755 if member.mode & 0o100 else 0o644
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        while chunk := content.read(CHUNK_BYTES):
            file.write(chunk)
