"""Lays what a job starts from into its workspace: the submitted folder, or what its source holds, and the file sets
that it names as inputs.

Archives are kept per team and file set, which never change: what storage once handed to a team needs no second
question, and what it did not is not found here. Those of sources are kept per team, place, version and credentials:
who cannot open a repository does not get it from here either.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from libs.common.contracts.messages import File, FilePage, Input, JobTemplate, ListFiles, Source
from libs.common.errors import Refusal, Unavailable
from services.executor.adapters.agent.agent_bus import FIRST_DELAY_S, LONGEST_DELAY_S, AgentBus, patiently_ask
from services.executor.adapters.environments.toolbox import Tell
from services.executor.adapters.runtimes.unpacking import MAX_BYTES, BadArchive, inner_path, unpack
from services.executor.adapters.workspaces import transfer
from services.executor.adapters.workspaces.sources import Sources
from services.executor.adapters.workspaces.transfer import TransferBroken, WrongContent
from services.executor.domain.beginnings import NotStarted
from services.executor.domain.sources import BadSource

ARCHIVE = "workspace.tar.gz"
PART = ".part"
CACHE_BYTES = 10 << 30
PATIENCE_S = 120.0
AT_ONCE = 4
# What a user calls a workspace becomes the name of a file.
_ID = re.compile(r"[a-z0-9]{1,64}")


class StagingFailed(NotStarted):
    """The job cannot start; the text says what is missing and why, for the user to read."""


class Staging:
    """Fetches for all attempts of a node.

    Args:
        front_door: URLs are signed for its host and port, as the node reaches it.
        max_bytes: the most that a workspace may unpack to.
    """

    def __init__(
        self, bus: AgentBus, cache: Path, front_door: str, sources: Sources, max_bytes: int = MAX_BYTES
    ) -> None:
        self._bus = bus
        self._sources = sources
        self._max_bytes = max_bytes
        self._cache = cache
        self._endpoint = urlsplit(front_door).netloc
        self._fetching: dict[Path, asyncio.Lock] = {}
        self._threads = transfer.Threads(2 * AT_ONCE)

    def close(self) -> None:
        """Leaves what is under way to its end."""
        self._threads.close()

    async def lay(self, template: JobTemplate, team_id: str, workspace: Path, tell: Tell) -> str:
        """Fills the workspace, from its beginning: what an earlier try left is removed.

        Returns:
            The version of the source: git's commit, S3's ETag; empty where there is no source.

        Raises:
            StagingFailed.
        """
        version = ""
        if not template.workspace_id and not template.source.kind and not template.inputs:
            return version
        await self._threads.run(transfer.remove_tree, workspace)
        if template.workspace_id:
            await self._lay_workspace(template.workspace_id, team_id, workspace)
        elif template.source.kind:
            version = await self._lay_source(template.source, team_id, workspace, tell)
        for wanted in template.inputs:
            await self._lay_input(wanted, team_id, workspace)
        return version

    async def _lay_workspace(self, fileset_id: str, team_id: str, workspace: Path) -> None:
        if not _ID.fullmatch(fileset_id):
            raise StagingFailed(f"the workspace cannot be fetched: {fileset_id[:80]!r} is not the id of a file set")
        kept = self._cache / team_id / f"{fileset_id}.tar.gz"

        async def fetch(target: Path) -> None:
            await self._fetch_archive(fileset_id, team_id, target)

        await self._unpack_kept(kept, fetch, workspace)

    async def _lay_source(self, source: Source, team_id: str, workspace: Path, tell: Tell) -> str:
        try:
            found = await self._sources.find(source)
            kept = self._cache / team_id / f"{found.key}.archive"
            await self._unpack_kept(kept, partial(self._sources.fetch, source, found, tell=tell), workspace)
        except BadSource as error:
            raise StagingFailed(f"the workspace: {error}", may_pass=error.may_pass) from error
        return found.version

    async def _unpack_kept(self, kept: Path, fetch: Callable[[Path], Awaitable[None]], workspace: Path) -> None:
        """Unpacks an archive that is kept, after it was fetched where it is not."""
        async with self._fetching.setdefault(kept, asyncio.Lock()):
            if not await self._threads.run(kept.exists):
                kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                await self._threads.run(make_room, self._cache, CACHE_BYTES)
                beside = kept.with_suffix(PART)
                beside.unlink(missing_ok=True)
                try:
                    await fetch(beside)
                    beside.rename(kept)
                finally:
                    beside.unlink(missing_ok=True)
            os.utime(kept)  # the longest unused go when room is needed
        try:
            await self._threads.run(_unpack_file, kept, workspace, self._max_bytes)
        except BadArchive as error:
            raise StagingFailed(f"the workspace cannot be unpacked: {error}") from error

    async def _fetch_archive(self, fileset_id: str, team_id: str, target: Path) -> None:
        async for file in self._files(fileset_id, team_id, "the workspace"):
            if file.path == ARCHIVE:
                if file.size_bytes > self._max_bytes:
                    detail = f"the workspace has {file.size_bytes} bytes packed; {self._max_bytes} is the most"
                    raise StagingFailed(detail)
                await self._fetch(file, target, fileset_id, team_id)
                return
        raise StagingFailed(f"the workspace {fileset_id} has no {ARCHIVE}")

    async def read_file(self, fileset_id: str, path: str, team_id: str, max_bytes: int) -> str:
        """The text of one file of a file set of the team. Raises StagingFailed."""
        if not _ID.fullmatch(fileset_id):
            raise StagingFailed(f"{fileset_id[:80]!r} is not the id of a file set")
        async for file in self._files(fileset_id, team_id, path):
            if file.path == path and file.size_bytes <= max_bytes:
                with tempfile.TemporaryDirectory(prefix="nabla-") as folder:
                    target = Path(folder, "file")
                    await self._fetch(file, target, fileset_id, team_id)
                    return await self._threads.run(target.read_text)
        raise StagingFailed(f"the file set {fileset_id} has no {path}")

    async def _lay_input(self, wanted: Input, team_id: str, workspace: Path) -> None:
        what = f"the input {wanted.path or '.'}"
        try:
            root = workspace / inner_path(wanted.path) if wanted.path.strip("./") else workspace
            files = [file async for file in self._files(wanted.fileset_id, team_id, what)]
            targets = [(file, root / inner_path(file.path)) for file in files]
        except BadArchive as error:
            raise StagingFailed(f"{what} cannot be laid: {error}") from error
        slots = asyncio.Semaphore(AT_ONCE)

        async def fetch(file: File, target: Path) -> None:
            async with slots:
                _refuse_links(workspace, target)
                target.parent.mkdir(parents=True, exist_ok=True)
                await self._fetch(file, target, wanted.fileset_id, team_id)

        await asyncio.gather(*(fetch(file, target) for file, target in targets))

    async def _files(self, fileset_id: str, team_id: str, what: str) -> AsyncIterator[File]:
        cursor = ""
        while True:
            question = ListFiles(fileset_id=fileset_id, cursor=cursor, limit=500, endpoint=self._endpoint)
            try:
                page = await patiently_ask(self._bus, question, FilePage, team_id, patience_s=PATIENCE_S)
            except Refusal as error:
                away = isinstance(error, Unavailable)
                raise StagingFailed(f"{what} cannot be fetched: {error.detail}", may_pass=away) from error
            for file in page.items:
                yield file
            cursor = page.next_cursor
            if not cursor:
                return

    async def _fetch(self, file: File, target: Path, fileset_id: str, team_id: str) -> None:
        """One file, again with a fresh URL while the object store is away."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        delay_s = FIRST_DELAY_S
        while True:
            try:
                await self._threads.run(_download_to, file, target)
            except WrongContent as error:
                raise StagingFailed(f"{file.path} of {fileset_id} is damaged: {error}") from error
            except TransferBroken as error:
                if asyncio.get_running_loop().time() + delay_s > deadline:
                    detail = f"{file.path} of {fileset_id} cannot be fetched: {error}"
                    raise StagingFailed(detail, may_pass=True) from error
            else:
                return
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)
            file = await self._anew(file, fileset_id, team_id)

    async def _anew(self, file: File, fileset_id: str, team_id: str) -> File:
        async for fresh in self._files(fileset_id, team_id, file.path):
            if fresh.path == file.path:
                return fresh
        return file


def make_room(folder: Path, limit_bytes: int) -> None:
    """Deletes the longest unused archives below `folder` until less than the limit is left."""
    found = []
    for path in folder.glob("*/*"):
        if path.suffix == PART:
            continue
        with contextlib.suppress(FileNotFoundError):  # another fetch makes room just now
            status = path.stat()
            found.append((status.st_atime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


def _unpack_file(archive: Path, workspace: Path, max_bytes: int) -> None:
    with archive.open("rb") as source:
        unpack(source, workspace, max_bytes=max_bytes)


def _download_to(file: File, target: Path) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as out:
        transfer.download(file.url, out, file.size_bytes, file.sha256)


def _refuse_links(workspace: Path, target: Path) -> None:
    """An input may not be written through a link that the workspace brought along."""
    if not target.parent.resolve().is_relative_to(workspace.resolve()):
        raise StagingFailed(f"{target.relative_to(workspace)} lies behind a link that leaves the workspace")
