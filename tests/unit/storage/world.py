"""The storage service without bus and object store: real database, real inbox, messages by hand."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from sqlalchemy import select

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Kind, Message
from libs.common.contracts.messages import (
    Attempt,
    File,
    Fileset,
    FilesetGrant,
    GetLog,
    Job,
    LogFrame,
    LogLine,
    LogPage,
    OpenFileset,
    Principal,
    SealFileset,
)
from libs.common.ids import new_id
from libs.common.inbox import Inbox
from libs.common.loglines import Slice
from libs.common.store import Store
from libs.common.waiting import end
from services.storage.adapters.tail import Tail
from services.storage.handlers import FilesetHandlers
from services.storage.log_handlers import LogHandlers
from services.storage.loops.filesets import Sweeper
from services.storage.loops.logs import LogCheck, LogKeeper, LogScrub
from services.storage.routes import routes
from services.storage.settings import StorageSettings
from services.storage.store import SKELETON, StorageUnit
from tests.support.databases import migrate_new
from tests.unit.storage.fakes import FakeFrames, FakeJobs, FakeObjects

M = TypeVar("M", bound=Message)

MEMBER = Principal(kind="user", id="u1", team_id="t1", role="member")
VIEWER = Principal(kind="user", id="u2", team_id="t1", role="viewer")
STRANGER = Principal(kind="user", id="u3", team_id="t2", role="owner")
EXECUTOR = Principal(kind="service", id="executor", team_id="t1")
ATTEMPT = Principal(kind="attempt", id="at1", team_id="t1", project_id="p1", job_id="js1", attempt=1)


class World:
    def __init__(self, url: str, folder: Path) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)
        self.objects = FakeObjects()
        self.settings = StorageSettings(home=folder, gap_patience_s=10.0)
        self.store = Store(url, StorageUnit, SKELETON, "storage", clock=lambda: self.now)
        self.inbox: Inbox[StorageUnit] = Inbox(self.store, "storage")
        self.tailed: list[LogPage] = []
        self.tail = Tail(self._hear)
        self.filesets = FilesetHandlers(self.store, self.objects, self.objects)
        self.logs = LogHandlers(self.store, self.objects, self.tail, self.settings)
        self.frames = FakeFrames()
        self.keeper = LogKeeper(
            self.store,
            self.inbox,
            self.logs,
            self.objects,
            self.frames,
            settings=self.settings,
            clock=lambda: self.now,
        )
        self.jobs = FakeJobs()
        self.check = LogCheck(self.store, self.inbox, self.logs, self.jobs, self.settings, clock=lambda: self.now)
        self.scrub = LogScrub(self.store, self.objects, self.objects, self.settings, clock=lambda: self.now)
        self.sweeper = Sweeper(self.store, self.objects, self.settings, clock=lambda: self.now)
        self.inbox.after_commit(self.tail.committed)
        self.routes = routes(self.filesets, self.logs)

    async def _hear(self, subject: str, body: bytes) -> None:
        assert subject.startswith("nabla.tail.t1.")
        self.tailed.append(LogPage.from_wire(body))

    def later(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    async def keeping(self, seconds: int) -> None:
        """Lets time pass with the loop that keeps logs at work."""
        for _ in range(seconds // 5):
            self.later(5)
            await self.keeper.keep_logs()

    async def start_scrubbing(self) -> None:
        """What storage does with its logs at each start."""
        self.scrub = LogScrub(self.store, self.objects, self.objects, self.settings, clock=lambda: self.now)
        while not self.scrub.done:
            await self.scrub.scrub()
        await self.scrub.forget_chunks()

    async def ask(self, message: Message, asker: Principal, reply: type[M], key: str = "") -> M:
        """What the bus does with a request or query."""
        route = self.routes.find(message.ROUTE.kind, message.ROUTE.type)
        assert route
        envelope = self.envelope(message, asker.team_id, key=key, sender=asker)
        route.rule.check(asker, message.ROUTE.name)
        if route.prepare:
            envelope = replace(envelope, facts=await route.prepare(message, envelope))
        if message.ROUTE.kind is Kind.REQUEST:
            return reply.from_wire((await self.inbox.apply(route, message, envelope)).body)
        async with self.store.view() as view:
            found = await route.handler(message, view, envelope)
        assert isinstance(found, reply)
        return found

    async def deliver(self, message: Message, team_id: str = "t1", event_id: str = "") -> None:
        """What the bus does with an event or a frame."""
        route = self.routes.find(message.ROUTE.kind, message.ROUTE.type)
        assert route
        envelope = self.envelope(message, team_id)
        await self.inbox.apply(route, message, replace(envelope, id=event_id) if event_id else envelope)

    def envelope(self, message: Message, team_id: str, key: str = "", sender: Principal | None = None) -> Envelope:
        return Envelope(
            id=new_id("event"),
            type=message.ROUTE.type,
            source="test",
            time=self.now,
            team_id=team_id,
            idempotency_key=key,
            sender=sender,
        )

    async def open(
        self, asker: Principal = MEMBER, *, bodies: dict[str, bytes] | None = None, **asked: object
    ) -> FilesetGrant:
        files = tuple(file_of(path, body) for path, body in (bodies or {"a/b.txt": b"hello"}).items())
        request = {"kind": "model", "project_id": "p1", "files": files} | asked
        return await self.ask(OpenFileset(**request), asker, FilesetGrant)

    async def sealed(self, asker: Principal = MEMBER, **asked: object) -> Fileset:
        bodies = asked.pop("bodies", {"a/b.txt": b"hello"})
        assert isinstance(bodies, dict)
        grant = await self.open(asker, bodies=bodies, **asked)
        for upload in grant.uploads:
            self.objects.upload(upload.url, bodies[upload.path])
        return await self.ask(SealFileset(fileset_id=grant.fileset.id), asker, Fileset)

    async def page(self, after: int = 0, limit: int = 0, asker: Principal = VIEWER, job_id: str = "js1") -> LogPage:
        return await self.ask(GetLog(job_id=job_id, after=after, limit=limit), asker, LogPage)

    async def whole_log(self, limit: int = 0) -> list[LogLine]:
        lines: list[LogLine] = []
        while True:
            page = await self.page(len(lines), limit)
            lines += page.lines
            if len(lines) >= page.last_sequence:
                return lines

    async def events(self) -> list[str]:
        outbox = SKELETON.outbox
        async with self.store.view() as view:
            rows = await view.execute(select(outbox.c.subject).order_by(outbox.c.id))
            return [row.subject for row in rows]

    async def heard(self) -> list[LogPage]:
        """What followers have heard by now: a tail waits for nothing outside of the loop."""
        for _ in range(200):
            await asyncio.sleep(0)
        return self.tailed

    async def heard_lines(self) -> list[LogLine]:
        pages = await self.heard()
        return [line for page in pages for each in page.slices for line in Slice.from_message(each).lines()]


@asynccontextmanager
async def running_world(url: str, folder: Path) -> AsyncIterator[World]:
    world = World(url, folder)
    await migrate_new(world.store, "storage")
    tasks = [asyncio.create_task(world.inbox.run()), asyncio.create_task(world.tail.run())]
    try:
        yield world
    finally:
        await end(tasks, again_s=1.0)
        await world.store.close()


def file_of(path: str, body: bytes) -> File:
    md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
    return File(path=path, size_bytes=len(body), md5=md5, sha256=hashlib.sha256(body).hexdigest())


def frame(
    first: int, *texts: str, last: bool = False, attempt: int = 1, rank: int = 0, job_id: str = "js1"
) -> LogFrame:
    lines = tuple(LogLine(stream="stdout", text=text) for text in texts)
    return LogFrame(
        job_id=job_id,
        attempt_id=f"at{attempt}",
        attempt=attempt,
        rank=rank,
        first_line=first,
        lines=lines,
        last=last,
    )


def job(revision: int, attempt: int = 0, job_id: str = "js1") -> Job:
    tried = Attempt(id=f"at{attempt}", number=attempt) if attempt else Attempt()
    return Job(id=job_id, team_id="t1", project_id="p1", revision=revision, attempt=tried)
