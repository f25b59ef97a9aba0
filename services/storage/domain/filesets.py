"""File sets: what may be in one, and when it is whole.

| from | driven by | to |
|---|---|---|
| open | seal: every file is in the object store with its size and MD5 | sealed |
| open | expire: nobody asked for it for a day | deleted |

`deleted` absorbs. A sealed set never changes again.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from libs.common.contracts.messages import File
from libs.common.errors import Invalid, TooLarge
from libs.common.transitions import TransitionTable

OPEN, SEALED, DELETED = "open", "sealed", "deleted"
FILESET = TransitionTable(
    "fileset", {(OPEN, "seal"): SEALED, (OPEN, "expire"): DELETED}, terminal=frozenset({SEALED, DELETED})
)

KINDS = ("workspace", "artifacts", "model", "bento", "environment")
MAX_FILES = 100_000
MAX_PATH_BYTES = 1024
# What S3 takes in one PUT.
MAX_FILE_BYTES = 5 << 30

_MD5 = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Control characters forge lines in lists and logs; a backslash is a separator on some clients' machines.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a set; `number` is its place in the order of paths and, with the set's id, its object key."""

    number: int
    path: str
    size_bytes: int
    md5: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Stored:
    """One version of one object, as the object store lists it."""

    key: str
    version: str
    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the object store compares with what a set should hold.

    Args:
        pins: file number -> the version that is right.
        wrong: files of which something else was uploaded, each with the newest of it.
    """

    pins: Mapping[int, str]
    missing: tuple[Entry, ...]
    wrong: tuple[tuple[Entry, Stored], ...]


def object_key(kind: str, fileset_id: str, number: int) -> str:
    """Generated ids only: user paths never reach the object store, where `a//b` and `a/b` are one key."""
    return f"{kind}/{fileset_id}/{number}"


def entries_of(files: Sequence[File]) -> tuple[Entry, ...]:
    """The files of a set in the order of their paths.

    Raises:
        TooLarge, Invalid: naming the first file that cannot be in a set.
    """
    if len(files) > MAX_FILES:
        detail = f"The file set has {len(files)} files; {MAX_FILES} is the most."
        raise TooLarge("too_many_files", detail, "Pack small files into an archive.")
    ordered = sorted(files, key=lambda file: file.path)
    entries = tuple(_entry(number, file) for number, file in enumerate(ordered))
    _check_tree([entry.path for entry in entries])
    return entries


def _entry(number: int, file: File) -> Entry:
    _check_path(file.path)
    if not _MD5.fullmatch(file.md5) or not _SHA256.fullmatch(file.sha256):
        raise Invalid(
            "bad_file_hash",
            f"{file.path!r} lacks its MD5 or SHA-256 in lower-case hexadecimal.",
            "Send both hashes of each file.",
        )
    if file.size_bytes < 0:
        raise Invalid("bad_file_size", f"{file.path!r} has a negative size.", "Send the size in bytes.")
    if file.size_bytes > MAX_FILE_BYTES:
        detail = f"{file.path!r} has {file.size_bytes} bytes; {MAX_FILE_BYTES} is the most for one file."
        raise TooLarge("file_too_large", detail, "Split the file.")
    return Entry(number, file.path, file.size_bytes, file.md5, file.sha256)


def _check_path(path: str) -> None:
    reason = _path_fault(path)
    if reason:
        raise Invalid(
            "bad_path",
            f"The path {path[:200]!r} cannot be in a file set: {reason}.",
            "Use relative paths with forward slashes.",
        )


def _path_fault(path: str) -> str:
    parts = path.split("/")
    if len(path.encode()) > MAX_PATH_BYTES:
        return f"it is longer than {MAX_PATH_BYTES} bytes"
    if path.startswith("/"):
        return "it is absolute"
    if "" in parts:
        return "it has an empty part"
    if "." in parts or ".." in parts:
        return "it has a part that is . or .."
    if _UNSAFE.search(path):
        return "it has a control character or a backslash"
    return ""


def _check_tree(ordered: Sequence[str]) -> None:
    names = set(ordered)
    if len(names) != len(ordered):
        twice = next(one for one, other in pairwise(ordered) if one == other)
        raise Invalid("path_twice", f"The path {twice!r} is there twice.", "Send each file once.")
    for path in ordered:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folder in names:
                detail = f"{folder!r} is a file and also the folder of {path!r}."
                raise Invalid("path_is_folder", detail, "Rename one of them.")


def digest_of(entries: Iterable[Entry]) -> str:
    """SHA-256 over the sorted lines `path NUL sha256 newline`."""
    total = hashlib.sha256()
    for entry in entries:
        total.update(f"{entry.path}\0{entry.sha256}\n".encode())
    return total.hexdigest()


def checked_digest(kind: str, claimed: str, entries: Sequence[Entry]) -> str:
    """The set's digest. A workspace's is that of the tree inside its archive, which only the client knows.

    Raises:
        Invalid: it is not the digest of these files.
    """
    if kind == "workspace":
        if not _SHA256.fullmatch(claimed):
            raise Invalid("bad_digest", "A workspace needs the SHA-256 digest of its tree.", "Send `digest`.")
        return claimed
    actual = digest_of(entries)
    if claimed not in ("", actual):
        raise Invalid(
            "bad_digest",
            f"The digest is not that of the files listed, which is {actual}.",
            "Hash the sorted lines path, NUL, sha256, newline.",
        )
    return actual


def judge(kind: str, fileset_id: str, entries: Iterable[Entry], stored: Iterable[Stored]) -> Verdict:
    """Compares what should be there with what is; the same file uploaded twice is right if one of them is."""
    by_key: dict[str, list[Stored]] = defaultdict(list)
    for item in stored:
        by_key[item.key].append(item)
    pins: dict[int, str] = {}
    missing: list[Entry] = []
    wrong: list[tuple[Entry, Stored]] = []
    for entry in entries:
        candidates = by_key.get(object_key(kind, fileset_id, entry.number), [])
        right = next((c for c in candidates if c.etag == entry.md5 and c.size_bytes == entry.size_bytes), None)
        if right:
            pins[entry.number] = right.version
        elif candidates:
            wrong.append((entry, candidates[0]))
        else:
            missing.append(entry)
    return Verdict(pins, tuple(missing), tuple(wrong))
