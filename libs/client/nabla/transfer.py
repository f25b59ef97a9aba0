"""Bytes between this machine and object storage, by presigned URL and never through the API."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Callable

from nabla.errors import TransferError
from nabla.http import WHAT_TO_TRUST, BrokenConnection, Http, Response, Untrusted
from nabla.manifest import CHUNK_BYTES, LocalFile, hash_file
from nabla.objects import File
from nabla.progress import Progress, silent

ATTEMPTS = 6
TIMEOUT_S = 60.0
_WORTH_REPEATING = frozenset({429, 500, 502, 503, 504})


class ExpiredUrl(TransferError):
    """The store refuses the URL; a new grant helps."""


class Transfers:
    """A connection pool of its own: presigned URLs carry their authority, so no token may go along."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep, ca: str = "") -> None:
        self._http = Http(ca)
        self._sleep = sleep

    def close(self) -> None:
        self._http.close()

    def abort(self) -> None:
        """Ends what is under way in other threads at once; nothing more goes through here."""
        self._http.abort()

    def put(self, url: str, file: LocalFile, progress: Progress = silent) -> None:
        told = _Told(progress)

        def once() -> None:
            headers = {"Content-Length": str(file.size_bytes), "Content-Type": "application/octet-stream"}
            with self._http.send("PUT", url, headers, _content(file, told), TIMEOUT_S) as response:
                response.read()
                _check(response, file.path)

        self._repeat(once, file.path, told)

    def fetch(self, file: File, folder: Path, progress: Progress = silent) -> Path:
        """Downloads one file of a file set below `folder`; what is there already with the same hash is kept.

        The file appears under its name only when it is whole and its SHA-256 is right.
        """
        target = inside(folder, file.path)
        try:
            if _is_there(target, file):
                progress(file.size_bytes)
                return target
            target.parent.mkdir(parents=True, exist_ok=True)
            part, told = target.with_name(target.name + ".part"), _Told(progress)
            self._repeat(lambda: self._download(file, part, told), file.path, told)
            os.replace(part, target)
        except OSError as error:
            reason = error.strerror or str(error)
            raise TransferError(f"Cannot write {str(target)!r}: {reason}.", "Make room there, or use --to.") from error
        return target

    def _download(self, file: File, part: Path, progress: Progress) -> None:
        sha256 = hashlib.sha256()
        with self._http.send("GET", file.url, {}, None, TIMEOUT_S) as response, part.open("wb") as stream:
            _check(response, file.path)
            for chunk in response.chunks(CHUNK_BYTES):
                stream.write(chunk)
                sha256.update(chunk)
                progress(len(chunk))
        if file.sha256 and sha256.hexdigest() != file.sha256:
            part.unlink()
            raise TransferError(f"{file.path!r} arrived damaged: its SHA-256 differs.", "Try again.")

    def _repeat(self, once: Callable[[], None], path: str, told: _Told) -> None:
        delay_s = 0.2
        for attempt in range(1, ATTEMPTS + 1):
            try:
                once()
                return
            except Untrusted as error:
                raise TransferError(f"Object storage cannot be asked: {error}.", WHAT_TO_TRUST) from error
            except BrokenConnection as error:
                told.take_back()
                if attempt == ATTEMPTS or self._http.aborted:
                    raise TransferError(f"The transfer of {path!r} broke off: {error}.", "Try again.") from error
            self._sleep(delay_s)
            delay_s *= 2


def inside(folder: Path, path: str) -> Path:
    """Where a file of a file set goes below `folder`; refuses names that lead out of it."""
    parts = PurePosixPath(path).parts
    windows = PureWindowsPath(path)
    if not parts or path.startswith("/") or ".." in parts or windows.drive or "\\" in path:
        raise TransferError(f"The file set holds a file named {path!r}, which could lead outside the folder.")
    return folder.joinpath(*parts)


def _is_there(target: Path, file: File) -> bool:
    if not (file.sha256 and target.is_file() and target.stat().st_size == file.size_bytes):
        return False
    return hash_file(target)[2] == file.sha256


class _Told:
    """Passes progress on, and can take back what it told when a transfer starts again."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._told_bytes = 0

    def __call__(self, size_bytes: int) -> None:
        self._told_bytes += size_bytes
        self._progress(size_bytes)

    def take_back(self) -> None:
        self(-self._told_bytes)


def _content(file: LocalFile, progress: Progress) -> Iterator[bytes]:
    """As many bytes as were announced: with fewer the store would wait for the rest until it gives up."""
    left = file.size_bytes
    try:
        with file.source.open("rb") as stream:
            while left and (chunk := stream.read(min(left, CHUNK_BYTES // 4))):
                yield chunk
                left -= len(chunk)
                progress(len(chunk))
    except OSError as error:
        raise TransferError(f"Cannot read {str(file.source)!r}: {error.strerror or error}.") from error
    if left:
        raise TransferError(
            f"{str(file.source)!r} has become shorter while it was sent.", "Try again when it is whole."
        )


def _check(response: Response, path: str) -> None:
    if response.ok:
        return
    if response.status in _WORTH_REPEATING:
        raise BrokenConnection(f"object storage answered HTTP {response.status}")
    kind = ExpiredUrl if response.status == HTTPStatus.FORBIDDEN else TransferError
    raise kind(f"Object storage refused {path!r}: HTTP {response.status}.", "Try again.")
