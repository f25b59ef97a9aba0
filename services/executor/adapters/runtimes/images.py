"""The images of one node: fetched when they are first asked for, kept within bounds, shown to those who may.

An image that was fetched with a team's credentials is that team's alone: others fetch it again with their own, and the
registry says whether they may. What an administrator put into the engine's store is everybody's, and is never deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from libs.common.contracts.messages import Container
from libs.common.image_names import name_problem
from services.executor.adapters.attempts.attempt_folder import Bind, Image, Isolation, write_durably
from services.executor.adapters.runtimes import cdi
from services.executor.adapters.runtimes.engine import Engine, NoEngine, image_list
from services.executor.adapters.runtimes.engine_calls import AUTH_PREFIX, Tell, ask, auth_file, follow
from services.executor.adapters.runtimes.image_root import has_program, lines_of
from services.executor.adapters.runtimes.podman import reason_in
from services.executor.domain.beginnings import NotStarted
from services.executor.domain.images import (
    LOCAL,
    BadUser,
    Kept,
    accounts_in,
    folder_name,
    groups_in,
    other_machine,
    pull_problem,
    registry_of,
    too_many,
    user_of,
)

PULL_LIMIT_S = 3600.0
CACHE_BYTES = 50_000_000_000
SHELL = "/bin/sh"
EMULATORS = Path("/proc/sys/fs/binfmt_misc")  # of other machines' programs

log = logging.getLogger(__name__)


class ImageRefused(NotStarted):
    """The job cannot have this image; the text says why, for the user to read."""


@dataclass(frozen=True, slots=True)
class Walls:
    """What a job runs in."""

    isolation: Isolation
    image: Image
    driver: Sequence[Bind] = ()  # the GPU driver's files, where no engine brings them


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks for an image, and what of it depends on them."""

    team_id: str
    uid: int | None
    gpu_indices: Sequence[int]
    tell: Tell


@dataclass(frozen=True, slots=True)
class _Record:
    """What is known of an image in the engine's store.

    Args:
        is_ours: fetched by the platform, which may delete it.
        teams: who may use it; empty for everybody.
    """

    size_bytes: int
    has_shell: bool
    users: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)
    is_ours: bool = False
    teams: tuple[str, ...] = ()


class Images:
    """Prepares images for all attempts of a node.

    Args:
        find_engine: finds this node's, or why there is none; it may take seconds.
        unpacked: below it an administrator unpacks images as NAME/rootfs, for nodes without an engine.
        cache: records of the images in the engine's store.
        in_use: ids that living attempts have on record.
    """

    def __init__(
        self,
        find_engine: Callable[[], Engine | NoEngine],
        unpacked: Path,
        cache: Path,
        *,
        cache_bytes: int = CACHE_BYTES,
        in_use: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._find_engine = find_engine
        self._engine: Engine | NoEngine | None = None
        self._finding = asyncio.Lock()
        self._unpacked = unpacked
        self._cache = cache
        self._cache_bytes = cache_bytes
        self._in_use = in_use
        self._fetching: dict[str, asyncio.Lock] = {}
        self._held: Counter[str] = Counter()
        self._ids: dict[str, str] = {}
        self._stamp: tuple[int, ...] = ()
        self._stamp_file: Path | None = None

    async def engine(self) -> Engine | NoEngine:
        """What there is, looked for once."""
        async with self._finding:
            if self._engine is None:
                self._engine = await asyncio.to_thread(self._find_engine)
        return self._engine

    @property
    def runtimes(self) -> tuple[str, ...]:
        """What this node can run an image with, as far as it is known by now."""
        if isinstance(self._engine, Engine):
            return (self._engine.kind,)
        return ("bwrap",) if any(self._unpacked.glob("*/rootfs")) else ()

    def sweep(self) -> None:
        """Removes credentials that an earlier agent, killed while it fetched, could not."""
        for path in self._cache.glob(f"{AUTH_PREFIX}*"):
            path.unlink(missing_ok=True)

    @asynccontextmanager
    async def prepared(self, container: Container, asker: Asker) -> AsyncIterator[Walls]:
        """An image that nobody deletes within the block; after it, whoever uses it must be among `in_use`.

        Raises:
            ImageRefused.
        """
        if problem := name_problem(container.image):
            raise ImageRefused(problem)
        engine = await self.engine()
        if isinstance(engine, NoEngine):
            yield await asyncio.to_thread(self._unpacked_walls, container, engine, asker)
            return
        devices = await asyncio.to_thread(_devices, asker.gpu_indices)
        image_id, record = await self._present(engine, container, asker)
        try:
            yield _walls(engine, image_id, record, container, asker, devices=devices)
        finally:
            self._held[image_id] -= 1

    @asynccontextmanager
    async def held(self, container: Container, asker: Asker) -> AsyncIterator[str]:
        """The id of an image to build upon, which nobody deletes within the block.

        Raises:
            ImageRefused.
        """
        if problem := name_problem(container.image):
            raise ImageRefused(problem)
        image_id, _ = await self._present(await self.builder(), container, asker)
        try:
            yield image_id
        finally:
            self._held[image_id] -= 1

    @asynccontextmanager
    async def built(self, reference: str, container: Container, asker: Asker) -> AsyncIterator[Walls | None]:
        """What was built under this name or id, as `prepared`; None when it is not here, or not for this team."""
        engine = await self.builder()
        image_id = await self._id_of(engine, reference)
        record = await asyncio.to_thread(self._read, image_id) if image_id else None
        if image_id is None or record is None or (record.teams and asker.team_id not in record.teams):
            yield None
            return
        devices = await asyncio.to_thread(_devices, asker.gpu_indices)
        self._held[image_id] += 1
        try:
            await asyncio.to_thread(self._write, image_id, record)
            named = container.model_copy(update={"image": f"{container.dockerfile} ({image_id[:12]})"})
            yield _walls(engine, image_id, record, named, asker, devices=devices)
        finally:
            self._held[image_id] -= 1

    async def export(self, image_id: str, folder: Path) -> None:
        """As files, for a build that must not see the engine's store."""
        code, _, err = await ask(await self.builder(), ["push", "--quiet", image_id, f"dir:{folder}"], PULL_LIMIT_S)
        if code != 0:
            raise ImageRefused(f"an image to build upon cannot be read: {reason_in(err)}")

    async def adopt(self, image_id: str, folder: Path, name: str, team_id: str) -> None:
        """Take in what a build left as files in `image` of this folder: this team's alone, under this name."""
        engine = await self.builder()
        async with self._fetching.setdefault(name, asyncio.Lock()):
            before = set(await self._ids_in_store(engine))
            self._held[image_id] += 1
            try:
                # From a relative path the engine takes no name, so nothing in it names an image of somebody else's.
                for words in (["pull", "--quiet", "dir:image"], ["tag", image_id, name]):
                    code, _, err = await ask(engine, words, PULL_LIMIT_S, folder)
                    if code != 0:
                        raise ImageRefused(f"what was built cannot be taken over: {reason_in(err)}")
                self._stamp = ()
                record = await self._record_of(engine, image_id)
                await asyncio.to_thread(self._write, image_id, _fetched(record, team_id, image_id not in before))
                await self._make_room(engine)
            finally:
                self._held[image_id] -= 1

    async def builder(self) -> Engine:
        """Raises ImageRefused where nothing can be built."""
        engine = await self.engine()
        if isinstance(engine, NoEngine):
            advice = f"; `{engine.remedy}` on the node" if engine.remedy else ""
            raise ImageRefused(f"this node cannot build images: {engine.reason}{advice}")
        if os.geteuid() != 0:
            raise ImageRefused("this node cannot build images: there the platform is an ordinary user")
        return engine

    def _unpacked_walls(self, container: Container, without: NoEngine, asker: Asker) -> Walls:
        root = self._unpacked / folder_name(container.image) / "rootfs"
        if not root.is_dir():
            advice = f"`{without.remedy}` on the node, or unpack it" if without.remedy else "unpack it"
            raise ImageRefused(
                f"this node cannot run the image {container.image}: {without.reason}, and it is not unpacked there; "
                f"{advice} into {root}"
            )
        if container.user:
            raise ImageRefused("over an unpacked image a job runs as the platform's own user: leave the user out")
        image = Image(image=str(root), name=container.image, has_shell=has_program(root, SHELL))
        return Walls("bwrap", image, cdi.driver_binds() if asker.gpu_indices else ())

    async def _present(self, engine: Engine, container: Container, asker: Asker) -> tuple[str, _Record]:
        """The image's id, held, and what is known of it."""
        name, has_credentials = container.image, bool(container.registry_username or container.registry_password)
        async with self._fetching.setdefault(name, asyncio.Lock()):
            image_id = await self._id_of(engine, name)
            record = await self._record_of(engine, image_id) if image_id else None
            fetched = image_id is None or (record is not None and record.teams and asker.team_id not in record.teams)
            if fetched:
                before = set(await self._ids_in_store(engine))
                await self._pull(engine, container, asker.tell)
                image_id = await self._id_of(engine, name)
                if image_id is None:
                    raise ImageRefused(f"{name} was fetched, and is gone again")
                record = await self._record_of(engine, image_id)
                record = _fetched(record, asker.team_id if has_credentials else "", image_id not in before)
            assert image_id
            assert record
            self._held[image_id] += 1
            await asyncio.to_thread(self._write, image_id, record)  # its time is when it was last used
        if fetched:
            await self._make_room(engine)
        return image_id, record

    async def _id_of(self, engine: Engine, name: str) -> str | None:
        """From the engine; without asking it as long as its list of images has not changed."""
        stamp = await asyncio.to_thread(self._read_stamp, engine)
        if stamp != self._stamp or not stamp:
            self._ids.clear()
            self._stamp = stamp
        if name not in self._ids:
            code, out, _ = await ask(engine, ["image", "inspect", "--format", "{{.Id}}", name])
            if code != 0 or not out.strip():
                return None
            self._ids[name] = out.split()[0]
        return self._ids[name]

    def _read_stamp(self, engine: Engine) -> tuple[int, ...]:
        if self._stamp_file is None:
            self._stamp_file = image_list(engine)
        with contextlib.suppress(OSError):
            status = self._stamp_file.stat()
            return status.st_mtime_ns, status.st_ino, status.st_size
        return ()

    async def _record_of(self, engine: Engine, image_id: str) -> _Record:
        known = await asyncio.to_thread(self._read, image_id)
        return known or await self._look_into(engine, image_id)

    async def _look_into(self, engine: Engine, image_id: str) -> _Record:
        code, out, err = await ask(engine, ["image", "inspect", "--format", "{{.Size}} {{.Architecture}}", image_id])
        if code != 0:
            raise ImageRefused(f"the image cannot be looked into: {reason_in(err)}")
        size, *architecture = out.split()
        size_bytes = int(size)
        why_not = other_machine(architecture[0] if architecture else "", os.uname().machine)
        if why_not and not await asyncio.to_thread(_emulates):
            raise ImageRefused(why_not)
        code, out, err = await ask(engine, ["image", "mount", image_id])
        if code != 0:
            raise ImageRefused(f"the image cannot be looked into: {reason_in(err)}")
        try:
            return await asyncio.to_thread(_read_root, Path(out.strip()), size_bytes)
        finally:
            await ask(engine, ["image", "unmount", image_id])

    async def _pull(self, engine: Engine, container: Container, tell: Tell) -> None:
        name, started = container.image, time.monotonic()
        if name.startswith(LOCAL):
            raise ImageRefused(f"there is no image {name} on this node, and local names are fetched from nowhere")
        if (container.registry_username or container.registry_password) and not registry_of(name):
            raise ImageRefused(f"which registry the credentials are for: write its host before {name}")
        tell(f"pulling {name}")
        with auth_file(self._cache, container) as auth:
            command = ["pull", f"--authfile={auth}", name]
            code, said = await follow(engine, command, PULL_LIMIT_S, tell)
        self._stamp = ()
        if code != 0:
            has_credentials = bool(container.registry_username or container.registry_password)
            detail, passing = pull_problem(name, reason_in(said) or said, has_credentials=has_credentials)
            raise ImageRefused(detail, may_pass=passing)
        tell(f"pulled {name} in {time.monotonic() - started:.1f} s")

    async def _ids_in_store(self, engine: Engine) -> list[str]:
        _, out, _ = await ask(engine, ["images", "--all", "--no-trunc", "--quiet"])
        return [line.removeprefix("sha256:") for line in out.split()]

    async def _make_room(self, engine: Engine) -> None:
        """A failure costs room and no job."""
        kept = [
            Kept(path.stem, record.size_bytes, path.stat().st_mtime_ns // 1000)
            for path in self._cache.glob("*.json")
            if (record := self._read(path.stem)) and record.is_ours
        ]
        used = {*self._in_use(), *(image_id for image_id, count in self._held.items() if count > 0)}
        for image_id in too_many(kept, self._cache_bytes, used):
            code, _, err = await ask(engine, ["rmi", "--force", image_id])
            if code == 0:
                (self._cache / f"{image_id}.json").unlink(missing_ok=True)
            else:
                log.warning("an image cannot be deleted", extra={"image": image_id, "reason": reason_in(err)})

    def _read(self, image_id: str) -> _Record | None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            raw = json.loads((self._cache / f"{image_id}.json").read_bytes())
            users = {name: (int(pair[0]), int(pair[1])) for name, pair in raw["users"].items()}
            return _Record(**raw | {"users": users, "teams": tuple(raw["teams"])})
        return None

    def _write(self, image_id: str, record: _Record) -> None:
        path = self._cache / f"{image_id}.json"
        if self._read(image_id) == record:
            os.utime(path)
            return
        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(path, json.dumps(asdict(record)).encode())


def _fetched(record: _Record, team_id: str, is_new: bool) -> _Record:
    """After a pull: whose it is. Fetched once without credentials it is everybody's."""
    teams = tuple(sorted({*record.teams, team_id})) if team_id and (is_new or record.teams) else ()
    return _Record(record.size_bytes, record.has_shell, record.users, record.groups, is_new or record.is_ours, teams)


def _devices(gpu_indices: Sequence[int]) -> list[str]:
    try:
        return cdi.names_of(gpu_indices)
    except cdi.NoDevices as error:
        raise ImageRefused(str(error)) from None


def _walls(
    engine: Engine, image_id: str, record: _Record, container: Container, asker: Asker, *, devices: list[str]
) -> Walls:
    uid = gid = None
    if container.user:
        found = user_of(container.user, record.users, record.groups)
        if isinstance(found, BadUser):
            raise ImageRefused(found.detail)
        uid, gid = found
        if asker.uid is None:
            raise ImageRefused("only where the platform is root can a job be another user of its image")
        if max(uid, gid) >= asker.uid:
            raise ImageRefused(f"user and group of an image are below {asker.uid} here, and {uid}:{gid} is not")
    image = Image(
        image=image_id,
        name=container.image,
        engine=list(engine.command),
        options=list(engine.options),
        uid=uid,
        gid=gid,
        has_shell=record.has_shell,
        devices=devices,
    )
    return Walls("podman", image)


def _emulates() -> bool:
    return any(EMULATORS.glob("qemu-*"))


def _read_root(root: Path, size_bytes: int) -> _Record:
    users, groups = accounts_in(lines_of(root, "/etc/passwd")), groups_in(lines_of(root, "/etc/group"))
    return _Record(size_bytes, has_program(root, SHELL), users, groups)
