"""Keeps what an attempt left behind: /artifacts as a file set, and declared folders of it as models.

Reads what a job wrote, so it opens every file without following links and takes nothing but regular files. Waits
for storage and the object store as long as that takes: only then is the attempt reported as ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    File,
    Fileset,
    FilesetGrant,
    ModelOutput,
    ModelVersion,
    OpenFileset,
    RegisterModel,
    SealFileset,
)
from libs.common.errors import NablaError, Refusal
from services.executor.adapters import transfer
from services.executor.adapters.agent_bus import FIRST_DELAY_S, LONGEST_DELAY_S, AgentBus, patiently_ask
from services.executor.adapters.transfer import TransferBroken
from services.executor.adapters.unpacking import BadArchive, inner_path

MAX_FILES = 10_000
MAX_DEPTH = 200
# Beneath the bus's limit of 8 MB a message, with 300 bytes for what is said of each file besides its path.
MAX_NAMES_BYTES = 4 << 20
AT_ONCE = 4
# A seal refused because a file is missing or differs: uploaded again this often before it is believed.
SEAL_TRIES = 3

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)


class NotKept(NablaError):
    """What the job left cannot be kept; the text says why, for the user to read."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose file sets these are."""

    attempt_id: str
    job_id: str
    number: int
    team_id: str
    project_id: str


class Sealing:
    """Uploads for all attempts of a node."""

    def __init__(self, bus: AgentBus, front_door: str) -> None:
        self._bus = bus
        self._endpoint = urlsplit(front_door).netloc
        self._threads = transfer.Threads(2 * AT_ONCE)

    def close(self) -> None:
        """Leaves what is under way to its end."""
        self._threads.close()

    async def seal_artifacts(self, owner: Owner, folder: Path) -> int:
        """Keeps the whole folder; the number of files, 0 when there is nothing to keep.

        Raises:
            NotKept.
        """
        sealed = await self._seal("artifacts", owner, folder, owner.attempt_id)
        return sealed.file_count if sealed else 0

    async def register_model(self, owner: Owner, artifacts: Path, wanted: ModelOutput) -> int:
        """Keeps one folder as a model and registers it; the new version's number.

        Raises:
            NotKept.
        """
        try:
            relative = inner_path(wanted.path.removeprefix("/artifacts").strip("/") or ".")
        except BadArchive as error:
            raise NotKept(f"its folder {error}") from error
        await self._threads.run(_refuse_links, artifacts, relative)
        name = hashlib.sha256(wanted.name.encode()).hexdigest()[:8]
        sealed = await self._seal("model", owner, artifacts / relative, f"{owner.attempt_id}-{name}")
        if sealed is None:
            raise NotKept(f"there is no file in /artifacts/{wanted.path}")
        order = RegisterModel(
            name=wanted.name,
            project_id=owner.project_id,
            framework=wanted.framework,
            fileset_id=sealed.id,
            job_id=owner.job_id,
            size_bytes=sealed.size_bytes,
            digest=sealed.digest,
        )
        key = f"{owner.attempt_id}-{name}-register"
        return (await self._ask(order, ModelVersion, owner, key)).version

    async def _seal(self, kind: str, owner: Owner, folder: Path, key: str) -> Fileset | None:
        """Opens, uploads and seals; again from the start, under a new key, when URLs have run out."""
        files = await self._threads.run(_listed, folder)
        if not files:
            return None
        delay_s, turn = FIRST_DELAY_S, 0
        while True:
            turn += 1
            order = OpenFileset(
                kind=kind,
                project_id=owner.project_id,
                digest=digest_of(files),
                files=tuple(files),
                job_id=owner.job_id,
                attempt=owner.number,
                endpoint=self._endpoint,
            )
            grant = await self._ask(order, FilesetGrant, owner, f"{key}-{kind}-open-{turn}")
            if grant.fileset.state == "sealed":
                return grant.fileset
            try:
                await self._upload_all(folder, grant)
                seal = SealFileset(fileset_id=grant.fileset.id)
                return await self._ask(seal, Fileset, owner, f"{key}-{kind}-seal-{turn}")
            except (TransferBroken, NotKept) as error:
                if isinstance(error, NotKept) and turn == SEAL_TRIES:
                    raise
                log.warning("upload is repeated", extra={"fileset_id": grant.fileset.id, "reason": str(error)})
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    async def _upload_all(self, folder: Path, grant: FilesetGrant) -> None:
        slots = asyncio.Semaphore(AT_ONCE)

        async def upload(file: File) -> None:
            async with slots:
                await self._threads.run(_upload_one, folder, file)

        await asyncio.gather(*(upload(file) for file in grant.uploads))

    async def _ask(self, message: Message, reply: type[M], owner: Owner, key: str) -> M:
        try:
            return await patiently_ask(self._bus, message, reply, owner.team_id, key=key)
        except Refusal as error:
            raise NotKept(error.detail) from error


def digest_of(files: list[File]) -> str:
    """SHA-256 over the sorted lines of path and file hash."""
    lines = sorted(f"{file.path}\0{file.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _refuse_links(artifacts: Path, relative: Path) -> None:
    if not (artifacts / relative).resolve().is_relative_to(artifacts.resolve()):
        raise NotKept(f"/artifacts/{relative} is a link that leads out of /artifacts")


def _listed(folder: Path) -> list[File]:
    with _told_as_not_kept(folder):
        return _list(folder)


def _list(folder: Path) -> list[File]:
    files: list[File] = []
    names_bytes = 0
    for path in _regular_files(folder):
        name = path.relative_to(folder).as_posix()
        names_bytes += len(name.encode())
        if len(files) == MAX_FILES or names_bytes > MAX_NAMES_BYTES:
            raise NotKept(
                f"more than {MAX_FILES} files, or {MAX_NAMES_BYTES >> 20} MB of names: pack them into an archive"
            )
        with _opened(path) as descriptor:
            if descriptor is not None:
                found = transfer.digests_of(descriptor)
                files.append(File(path=name, size_bytes=found.size_bytes, md5=found.md5, sha256=found.sha256))
    return files


def _regular_files(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Depth first, sorted, through real folders only."""
    if folder.is_symlink() or not folder.is_dir():
        return
    if depth > MAX_DEPTH:
        raise NotKept(f"folders are nested deeper than {MAX_DEPTH}: pack them into an archive")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise NotKept(f"the name {entry.name!r} is not text") from None
        if entry.is_dir(follow_symlinks=False):
            yield from _regular_files(Path(entry.path), depth + 1)
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


@contextmanager
def _told_as_not_kept(folder: Path) -> Iterator[None]:
    """A file that the job closed to everybody, or a name too long to open, is told and not tried again for ever."""
    try:
        yield
    except OSError as error:
        name = os.path.relpath(error.filename, folder) if error.filename else "a file"
        raise NotKept(f"{name} cannot be read: {error.strerror or error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """The open file, or None when it is not a regular file after all."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)


def _upload_one(folder: Path, file: File) -> None:
    with _told_as_not_kept(folder), _opened(folder / inner_path(file.path)) as descriptor:
        assert descriptor is not None, "it was a regular file when it was listed, and its job has ended"
        transfer.upload(file.url, descriptor, os.fstat(descriptor).st_size)
