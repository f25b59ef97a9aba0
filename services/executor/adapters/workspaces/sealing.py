"""Keeps what an attempt left behind: /artifacts as a file set, and declared folders of it as models.

Reads what a job wrote, so it opens every file without following links and takes nothing but regular files. One file
that cannot be kept costs itself alone: of artifacts the rest is kept, and what was left out is named. A model is kept
whole or not at all. Waits for storage and the object store as long as that takes: only then is the attempt reported
as ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from libs.common.waiting import end
from services.executor.adapters.agent.agent_bus import FIRST_DELAY_S, LONGEST_DELAY_S, AgentBus, patiently_ask
from services.executor.adapters.runtimes.unpacking import BadArchive, inner_path
from services.executor.adapters.workspaces import transfer
from services.executor.adapters.workspaces.transfer import TransferBroken, TransferRefused

MAX_FILES = 10_000
MAX_DEPTH = 200
# Beneath the bus's limit of 8 MB a message, with 300 bytes for what is said of each file besides its path.
MAX_NAMES_BYTES = 4 << 20
# What storage takes of one file, and of its path: beyond them it refuses the whole set.
MAX_FILE_BYTES = 5 << 30
MAX_PATH_BYTES = 1024
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
AT_ONCE = 4
# A seal refused because a file is missing or differs: this often after uploads that brought nothing new. Of a large
# set storage asks for one part after the other, and those are no failures.
SEAL_TRIES = 3
# The object store refuses the same files this often, each time by new URLs.
REFUSED_TRIES = 4
# So many of the files that are left out are named; of the others only the number is told.
NAMED = 5
_LONGEST_NAME = 120

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)


class NotKept(NablaError):
    """What the job left cannot be kept; the text says why, for the user to read."""


@dataclass(slots=True)
class LeftOut:
    """What cannot be kept: the first ones with the reason, for the user to read, and how many there are."""

    named: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, path: str, why: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(f"{_printable(path)}: {why}")

    def lines(self) -> list[str]:
        more = self.count - len(self.named)
        return [*self.named, *([f"{more} more"] if more else [])]


@dataclass(slots=True)
class Listing:
    """The files of a folder that can be kept, and those that cannot."""

    files: list[File] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass(frozen=True, slots=True)
class Kept:
    """How many files were kept, and what was left out."""

    file_count: int
    left_out: LeftOut


class _FileLost(NablaError):
    """A file that could be read when it was listed cannot be read any more."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose file sets these are; `attempt_id` tells them from those of all others, other ranks' too."""

    attempt_id: str
    job_id: str
    number: int
    team_id: str
    project_id: str
    rank: int = 0


class _Refusals:
    """Tells URLs that ran out during a long upload from a store that takes nothing."""

    def __init__(self) -> None:
        self._asked: set[str] = set()
        self._count = 0

    def note(self, error: TransferBroken, asked: set[str]) -> None:
        """Raises the error when so many times in a row the store refused, and took nothing in between."""
        self._count = self._count + 1 if isinstance(error, TransferRefused) and asked == self._asked else 1
        self._asked = asked
        if isinstance(error, TransferRefused) and self._count >= REFUSED_TRIES:
            raise error


class Sealing:
    """Uploads for all attempts of a node."""

    def __init__(self, bus: AgentBus, front_door: str) -> None:
        self._bus = bus
        self._endpoint = urlsplit(front_door).netloc
        self._threads = transfer.Threads(2 * AT_ONCE)

    def close(self) -> None:
        """Leaves what is under way to its end."""
        self._threads.close()

    async def seal_artifacts(self, owner: Owner, folder: Path) -> Kept:
        """Keeps all of the folder that can be kept.

        Raises:
            NotKept: nothing of it was.
        """
        listing = await self._threads.run(_listed, folder)
        sealed = await self._seal("artifacts", owner, folder, owner.attempt_id, listing)
        return Kept(sealed.file_count if sealed else 0, listing.left_out)

    async def seal_record(self, owner: Owner, file: Path, kind: str) -> str:
        """Keeps one file that the platform wrote, as a file set of its own; its id. Raises NotKept."""
        sealed = await self._seal(kind, owner, file.parent, owner.attempt_id, await self._threads.run(_of_one, file))
        assert sealed, "there is a file"
        return sealed.id

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
        listing = await self._threads.run(_listed, artifacts / relative)
        _refuse_half(listing)
        sealed = await self._seal("model", owner, artifacts / relative, f"{owner.attempt_id}-{name}", listing)
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

    async def _seal(self, kind: str, owner: Owner, folder: Path, key: str, listing: Listing) -> Fileset | None:
        """Opens, uploads and seals; again from the start, under a new key, when URLs have run out.

        Raises:
            TransferRefused: the store says no to new URLs too: that is for whoever runs it.
        """
        delay_s, turn, tries = FIRST_DELAY_S, 0, 0
        uploaded: set[str] = set()
        refusals = _Refusals()
        while listing.files:
            turn += 1
            order = OpenFileset(
                kind=kind,
                project_id=owner.project_id,
                digest=digest_of(listing.files),
                files=tuple(listing.files),
                job_id=owner.job_id,
                attempt=owner.number,
                rank=owner.rank,
                endpoint=self._endpoint,
            )
            turn_key = f"{key}-{kind}-{order.digest[:8]}-{turn}"  # one key never stands for two lists of files
            grant = await self._ask(order, FilesetGrant, owner, f"{turn_key}-open")
            if grant.fileset.state == "sealed":
                return grant.fileset
            asked = {file.path for file in grant.uploads}
            try:
                await self._upload_all(folder, grant)
                seal = SealFileset(fileset_id=grant.fileset.id)
                return await self._ask(seal, Fileset, owner, f"{turn_key}-seal")
            except _FileLost as error:
                listing.files = [file for file in listing.files if file.path != error.path]
                listing.left_out.add(error.path, error.why)
                if kind == "model":
                    _refuse_half(listing)
                continue
            except NotKept as error:
                if asked - uploaded:
                    uploaded |= asked
                    tries, delay_s = 0, FIRST_DELAY_S
                    continue
                tries += 1
                if tries == SEAL_TRIES:
                    raise
                reason: Exception = error
            except TransferBroken as error:
                refusals.note(error, asked)
                reason = error
            log.warning("upload is repeated", extra={"fileset_id": grant.fileset.id, "reason": str(reason)})
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)
        return None

    async def _upload_all(self, folder: Path, grant: FilesetGrant) -> None:
        slots = asyncio.Semaphore(AT_ONCE)

        async def upload(file: File) -> None:
            async with slots:
                await self._threads.run(_upload_one, folder, file)

        uploads = [asyncio.create_task(upload(file)) for file in grant.uploads]
        try:
            await asyncio.gather(*uploads)
        finally:
            await end(uploads, again_s=1.0)  # those that have not begun would meet the next turn's

    async def _ask(self, message: Message, reply: type[M], owner: Owner, key: str) -> M:
        try:
            return await patiently_ask(self._bus, message, reply, owner.team_id, key=key)
        except Refusal as error:
            raise NotKept(error.detail) from error


def _of_one(path: Path) -> Listing:
    file = _described(path, path.name)
    return Listing([file] if file else [])


def digest_of(files: list[File]) -> str:
    """SHA-256 over the sorted lines of path and file hash."""
    lines = sorted(f"{file.path}\0{file.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _refuse_links(artifacts: Path, relative: Path) -> None:
    if not (artifacts / relative).resolve().is_relative_to(artifacts.resolve()):
        raise NotKept(f"/artifacts/{relative} is a link that leads out of /artifacts")


def _refuse_half(listing: Listing) -> None:
    """A model without one of its files is no model."""
    if listing.left_out.count:
        raise NotKept("; ".join(listing.left_out.lines()))


def _listed(folder: Path) -> Listing:
    listing = Listing()
    names_bytes = 0
    if folder.is_symlink() or not folder.is_dir():
        return listing
    for path in _regular_files(folder, folder, listing.left_out):
        name = path.relative_to(folder).as_posix()
        if len(listing.files) == MAX_FILES or names_bytes + len(name.encode()) > MAX_NAMES_BYTES:
            most = f"{MAX_FILES} files and {MAX_NAMES_BYTES >> 20} MB of names"
            listing.left_out.add(name, f"beyond the most that is kept ({most}); pack files into an archive")
            continue
        try:
            file = _described(path, name)
        except OSError as error:
            listing.left_out.add(name, _unreadable(error))
            continue
        if file and file.size_bytes > MAX_FILE_BYTES:
            listing.left_out.add(name, f"larger than the {MAX_FILE_BYTES >> 30} GiB that a file may have; split it")
        elif file:
            listing.files.append(file)
            names_bytes += len(name.encode())
    return listing


def _described(path: Path, name: str) -> File | None:
    """None for what is no regular file; without hashes when it is too large to be kept."""
    with _opened(path) as descriptor:
        if descriptor is None:
            return None
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes > MAX_FILE_BYTES:
            return File(path=name, size_bytes=size_bytes)
        found = transfer.digests_of(descriptor)
        return File(path=name, size_bytes=found.size_bytes, md5=found.md5, sha256=found.sha256)


def _regular_files(folder: Path, top: Path, left_out: LeftOut, depth: int = 0) -> Iterator[Path]:
    """Depth first, sorted, through real folders only; what cannot be named or opened is left out."""
    if depth > MAX_DEPTH:
        left_out.add(os.path.relpath(folder, top), f"nested deeper than {MAX_DEPTH} folders; pack it into an archive")
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        left_out.add(os.path.relpath(folder, top), _unreadable(error))
        return
    for entry in entries:
        fault = _name_fault(os.path.relpath(entry.path, top))
        is_folder = entry.is_dir(follow_symlinks=False)
        if fault and (is_folder or entry.is_file(follow_symlinks=False)):
            left_out.add(os.path.relpath(entry.path, top), fault)
        elif is_folder:
            yield from _regular_files(Path(entry.path), top, left_out, depth + 1)
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def _name_fault(path: str) -> str:
    try:
        size_bytes = len(path.encode())
    except UnicodeEncodeError:
        return "its name is not text"
    if size_bytes > MAX_PATH_BYTES:
        return f"its path is longer than {MAX_PATH_BYTES} bytes; pack it into an archive"
    return "its name holds a control character or a backslash" if _UNSAFE.search(path) else ""


def _printable(path: str) -> str:
    """Of any name that a file may have, one line that a log can show."""
    text = path.encode("utf-8", "backslashreplace").decode()
    text = _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME // 2]}...{text[-_LONGEST_NAME // 2 :]}"


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """The open file, or None when it is not a regular file after all."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)


def _upload_one(folder: Path, file: File) -> None:
    """A file that the job closed to everybody meanwhile is told, and not tried again for ever."""
    try:
        with _opened(folder / inner_path(file.path)) as descriptor:
            if descriptor is not None:
                transfer.upload(file.url, descriptor, os.fstat(descriptor).st_size)
                return
    except OSError as error:
        raise _FileLost(file.path, _unreadable(error)) from error
    raise _FileLost(file.path, "no regular file any more")
