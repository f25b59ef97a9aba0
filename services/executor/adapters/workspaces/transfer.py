"""Bytes between a node and object storage, by presigned URL, streaming, with the standard library's client.

Everything here blocks: call it in `Threads`.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from libs.common.errors import NablaError
from services.executor.domain.isolation import is_loopback

CHUNK_BYTES = 1024 * 1024
TIMEOUT_S = 60.0
# Too slow, too early, too many: what a store says of a moment, and not of a request.
PASSING = frozenset({408, 425, 429})
T = TypeVar("T")


class Threads:
    """Threads of their own for what may wait for an object store, or for a zygote.

    One that hangs takes all of them for minutes, and must not take those that start other jobs and end them.
    """

    def __init__(self, count: int, name: str = "nabla-transfer") -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class TransferBroken(NablaError):
    """The connection or the store failed: worth repeating, perhaps with a new URL."""


class TransferRefused(TransferBroken):
    """The store answers, and says no. A new URL may help, as old ones run out; the same answer again will not pass."""


class WrongContent(NablaError):
    """What came is not what was promised: its size or its hash differs."""


@dataclass(frozen=True, slots=True)
class Digests:
    size_bytes: int
    md5: str
    sha256: str


def download(url: str, target: BinaryIO, size_bytes: int, sha256: str) -> None:
    """Writes the object to `target` and checks it on the way.

    Args:
        sha256: hex; empty when it is not known.

    Raises:
        TransferBroken, WrongContent; OSError where this disk is full, which no other URL would change.
    """
    digest, received = hashlib.sha256(), 0
    try:
        with _answer(_get(url)) as answer:
            while chunk := answer.read(CHUNK_BYTES):
                received += len(chunk)
                if received > size_bytes:
                    raise WrongContent(f"more than the {size_bytes} bytes that were promised")
                digest.update(chunk)
                target.write(chunk)
    except (OSError, http.client.HTTPException) as error:
        if is_full_disk(error):
            raise
        raise _broken(error) from error
    if received != size_bytes:
        raise TransferBroken(f"{received} of {size_bytes} bytes came")
    if sha256 and digest.hexdigest() != sha256:
        raise WrongContent("its SHA-256 differs from the one it was stored with")


def upload(url: str, descriptor: int, size_bytes: int) -> None:
    """PUTs an open file from its beginning.

    Raises:
        TransferBroken.
    """
    with os.fdopen(os.dup(descriptor), "rb") as source:
        source.seek(0)
        request = urllib.request.Request(_checked(url), data=_pieces(source, size_bytes), method="PUT")
        request.add_header("Content-Length", str(size_bytes))
        request.add_header("Content-Type", "application/octet-stream")
        try:
            with _answer(request) as answer:
                answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise _broken(error) from error


def digests_of(descriptor: int) -> Digests:
    """Size and hashes of an open file, read from its beginning."""
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    with os.fdopen(os.dup(descriptor), "rb") as source:
        source.seek(0)
        while chunk := source.read(CHUNK_BYTES):
            md5.update(chunk)
            sha256.update(chunk)
            size += len(chunk)
    return Digests(size, md5.hexdigest(), sha256.hexdigest())


def is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def remove_tree(path: Path) -> None:
    """Deletes a tree that a job wrote: follows no link, and is not stopped by folders without permissions.

    Nor by any depth: each folder is moved up to the top before it is emptied, so there is no recursion and no path
    that is too long.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    path.chmod(0o700)
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while _empty(top, top):
            for name in os.listdir(top):
                _remove_shallow(name, top)
    finally:
        os.close(top)
    path.rmdir()


def _remove_shallow(name: str, top: int) -> None:
    folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    try:
        _empty(folder, top)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=top)


def _empty(folder: int, top: int) -> bool:
    """Deletes the files of a folder and moves its folders up; whether there are any folders."""
    found = False
    for entry in list(os.scandir(folder)):
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.name, dir_fd=folder)
            continue
        found = True
        os.chmod(entry.name, 0o700, dir_fd=folder)
        if folder != top:
            os.rename(entry.name, uuid.uuid4().hex, src_dir_fd=folder, dst_dir_fd=top)
    return found


def _pieces(source: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    """Exactly `size_bytes`: a file that grew must not break the protocol."""
    left = size_bytes
    while left > 0 and (chunk := source.read(min(CHUNK_BYTES, left))):
        left -= len(chunk)
        yield chunk


def _answer(request: urllib.request.Request) -> http.client.HTTPResponse:
    """Past the machine's proxy where this machine itself is asked: a proxy would ask its own loopback."""
    loopback = is_loopback(urlsplit(request.full_url).hostname or "")
    handlers = [urllib.request.ProxyHandler({})] if loopback else []
    answer: http.client.HTTPResponse = urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_S)
    return answer


def _get(url: str) -> urllib.request.Request:
    return urllib.request.Request(_checked(url))


def _checked(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise WrongContent("its URL is not one of http or https")
    return url


def _broken(error: Exception) -> TransferBroken:
    refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in PASSING
    return TransferRefused(_told(error)) if refused else TransferBroken(_told(error))


def _told(error: Exception) -> str:
    """Without the URL, which is a credential."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the object store answered {error.code} {error.reason}"
    return f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
