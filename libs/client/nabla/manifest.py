"""Describes files before they are uploaded as a file set: sizes, checksums and the digest of the whole.

Used in jobs (Python 3.8, standard library only) and by the client alike, so both name the same bytes the same.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Tuple, Union

from nabla.errors import TransferError
from nabla.progress import Progress, Stages, silent, unseen

PathLike = Union[str, "os.PathLike[str]"]
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine and the name it shall have in the file set (forward slashes)."""

    path: str
    source: Path
    size_bytes: int
    md5: str
    sha256: str

    def as_json(self) -> Dict[str, object]:
        return {"path": self.path, "size_bytes": self.size_bytes, "md5": self.md5, "sha256": self.sha256}


@dataclass(frozen=True)
class Manifest:
    """What a file set will hold; `digest` is the SHA-256 over the sorted lines "path NUL sha256 LF".

    `left_out` are the links to folders, which are not followed.
    """

    digest: str
    files: Tuple[LocalFile, ...]
    left_out: Tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def describe(path: PathLike, stages: Stages = unseen) -> Manifest:
    """Reads a file, or every file below a folder, once.

    Links to files are followed, because caches of model hubs are made of them; links to folders are not, and the
    manifest names them.
    """
    root = Path(path)
    if not root.exists():
        raise TransferError(f"There is no file or folder {str(root)!r}.", "Check the path.")
    left_out: List[str] = []
    found = list(_walk(root, left_out))
    told = stages("Reading", sum(os.path.getsize(source) for _, source in found if source.is_file()))
    files = [_hashed(name, source, told) for name, source in found]
    if not files:
        raise TransferError(f"The folder {str(root)!r} holds no file.", "Give a folder that is not empty.")
    return Manifest(digest_of(files), tuple(files), tuple(left_out))


def digest_of(files: List[LocalFile]) -> str:
    lines = sorted(f"{file.path}\0{file.sha256}\n".encode() for file in files)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def new_md5() -> hashlib._Hash:
    """MD5 as a checksum, which S3 wants; systems that forbid it for security still allow that."""
    try:
        return hashlib.md5(usedforsecurity=False)
    except TypeError:  # Python 3.8
        return hashlib.md5()  # noqa: S324


def hash_file(source: Path, progress: Progress = silent) -> Tuple[int, str, str]:
    """Size in bytes, MD5 and SHA-256, in one pass and constant memory."""
    md5, sha256, size_bytes = new_md5(), hashlib.sha256(), 0
    with source.open("rb") as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            if not chunk:
                return size_bytes, md5.hexdigest(), sha256.hexdigest()
            md5.update(chunk)
            sha256.update(chunk)
            size_bytes += len(chunk)
            progress(len(chunk))


def _walk(root: Path, left_out: List[str]) -> Iterator[Tuple[str, Path]]:
    if not root.is_dir():
        yield root.name, root
        return
    for folder, folders, names in os.walk(str(root), onerror=_refuse):
        folders.sort()
        links = (Path(folder, name) for name in folders if os.path.islink(os.path.join(folder, name)))
        left_out.extend(f"{link.relative_to(root).as_posix()}/" for link in links)
        for name in sorted(names):
            source = Path(folder, name)
            yield source.relative_to(root).as_posix(), source


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed would be missing from the file set without a word."""
    raise TransferError(
        f"Cannot read the folder {str(error.filename)!r}: {error.strerror}.", "Make it readable."
    ) from error


def _hashed(path: str, source: Path, progress: Progress) -> LocalFile:
    if source.exists() and not source.is_file():
        raise TransferError(f"{str(source)!r} is neither a file nor a folder.", "Take it out of the folder.")
    if "\0" in path or path.encode("utf-8", "replace").decode() != path:
        raise TransferError(f"The name {path!r} is not UTF-8.", "Rename the file.")
    try:
        size_bytes, md5, sha256 = hash_file(source, progress)
    except OSError as error:
        raise TransferError(f"Cannot read {str(source)!r}: {error.strerror}.") from error
    return LocalFile(path, source, size_bytes, md5, sha256)
