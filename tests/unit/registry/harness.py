"""The registry without a bus: its real stores, inboxes, rules and handlers, and every message delivered twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from sqlalchemy import select

from libs.common.contracts import messages as m
from libs.common.contracts.envelope import ANSWER_DUPLICATE, Envelope
from libs.common.contracts.message import Kind, Message
from libs.common.errors import Unauthenticated
from libs.common.ids import new_id
from libs.common.inbox import Answer, Inbox
from libs.common.routing import Route
from libs.common.store import Store
from libs.common.waiting import end
from services.registry.adapters.vault import FileVault
from services.registry.handlers.models import Origins
from services.registry.handlers.secrets import Secrets
from services.registry.routes import routes
from services.registry.store import SKELETON, RegistryUnit
from services.registry.store.runs import SKELETON as RUNS_SKELETON
from services.registry.store.runs import RunsUnit
from tests.support.databases import migrate_new

M = TypeVar("M", bound=Message)


@dataclass
class Time:
    """A clock that goes only when told to."""

    now: datetime = datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **duration: float) -> None:
        self.now += timedelta(**duration)


@dataclass
class FakeFilesets:
    known: dict[str, m.Fileset] = field(default_factory=dict)

    async def get(self, fileset_id: str, team_id: str) -> m.Fileset | None:
        found = self.known.get(fileset_id)
        return found if found and found.team_id == team_id else None


@dataclass
class FakeJobs:
    known: dict[str, m.Job] = field(default_factory=dict)

    async def get(self, job_id: str, team_id: str) -> m.Job | None:
        found = self.known.get(job_id)
        return found if found and found.team_id == team_id else None


@dataclass
class FakeAttempts:
    """By the hash of their token."""

    living: dict[str, m.Execution] = field(default_factory=dict)

    async def of_token(self, token_hash: str) -> m.Execution:
        if token_hash not in self.living:
            raise Unauthenticated("token_invalid", "The token is not one of a running attempt.")
        return self.living[token_hash]


@dataclass
class FakeOutside:
    """What storage and the scheduler know."""

    filesets: FakeFilesets = field(default_factory=FakeFilesets)
    jobs: FakeJobs = field(default_factory=FakeJobs)
    attempts: FakeAttempts = field(default_factory=FakeAttempts)

    def upload(self, message: m.RegisterModel, principal: m.Principal) -> None:
        """Whoever registers a version has uploaded its files, unless the test has said something else of them."""
        files = m.Fileset(
            id=message.fileset_id,
            team_id=principal.team_id,
            project_id=principal.project_id,
            kind="model",
            state="sealed",
            size_bytes=message.size_bytes,
            digest=message.digest,
        )
        self.filesets.known.setdefault(files.id, files)


@dataclass
class Catalogue:
    """A registry in a test."""

    store: Store[RegistryUnit]
    runs: Store[RunsUnit]
    time: Time
    vault: FileVault
    outside: FakeOutside = field(default_factory=FakeOutside)
    inboxes: dict[str, Inbox[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = Secrets(self.vault, self.outside.attempts, self.outside.jobs)
        self.routes = routes(Origins(self.outside.filesets, self.outside.jobs), values)
        self.inboxes = {"": Inbox(self.store, "registry"), "runs": Inbox(self.runs, "registry")}

    async def ask(self, message: Message, principal: m.Principal, reply: type[M]) -> M:
        """As the bus does it, but twice under one key: the second answer is the first, and nothing more happens."""
        route = self.route_of(message)
        if route.message.ROUTE.kind is Kind.QUERY:
            return await self._query(route, message, principal, reply)
        key = uuid4().hex
        first = await self.send(message, principal, key)
        count = len(await self.emitted())
        again = await self.send(message, principal, key)
        if not route.repeatable:
            assert (again.status, again.body) == (ANSWER_DUPLICATE, first.body)
        assert len(await self.emitted()) == count
        return reply.from_wire(first.body)

    async def send(self, message: Message, principal: m.Principal, key: str) -> Answer:
        route = self.route_of(message)
        route.rule.check(principal, route.message.ROUTE.name)
        call = self._envelope(message, sender=principal, idempotency_key=key)
        if isinstance(message, m.RegisterModel):
            self.outside.upload(message, principal)
        if route.prepare:
            call = replace(call, facts=await route.prepare(message, call))
        return await self.inboxes[route.database].apply(route, message, call)

    async def tell(self, event: Message) -> None:
        """Delivers an event, the same delivery again, and the same event as if the inbox had forgotten it."""
        route = self.route_of(event)
        inbox = self.inboxes[route.database]
        call = self._envelope(event)
        for each in (call, call, self._envelope(event)):
            await inbox.apply(route, event, each)

    async def emitted(self) -> list[tuple[str, dict[str, Any], dict[str, str]]]:
        """Type, body and headers of all messages in both outboxes, in order."""
        found = []
        for store in (self.store, self.runs):
            outbox = store.skeleton.outbox
            async with store.view() as view:
                rows = (await view.execute(select(outbox).order_by(outbox.c.id))).all()
            for row in rows:
                headers = json.loads(row.headers)
                found.append((headers["ce-type"], json.loads(row.body), headers))
        return found

    async def emitted_types(self) -> list[str]:
        return [kind for kind, _, _ in await self.emitted()]

    async def audit(self) -> list[Any]:
        found: list[Any] = []
        for store in (self.store, self.runs):
            async with store.view() as view:
                table = view.audit_rows
                found += (await view.execute(select(table).order_by(table.c.id))).all()
        return found

    async def member(self, team: str, role: str, user_id: str = "", name: str = "") -> m.Principal:
        """A user with this role in the named team; user and team are made when they are new."""
        name = name or f"{role}-{uuid4().hex[:8]}"
        async with self.store.begin() as unit:
            team_id = await unit.accounts.team_named(team)
            if team_id is None:
                team_id = new_id("team")
                await unit.accounts.add_team(team_id, team, self.time())
            if not user_id:
                user_id = new_id("user")
                await unit.accounts.add_user(user_id, name, self.time())
            await unit.accounts.add_member(user_id, team_id, role, self.time())
        return m.Principal(kind="user", id=user_id, name=name, team_id=team_id, role=role)

    def route_of(self, message: Message) -> Route:
        route = self.routes.find(message.ROUTE.kind, message.ROUTE.type)
        assert route, message.ROUTE
        return route

    async def _query(self, route: Route, message: Message, principal: m.Principal, reply: type[M]) -> M:
        route.rule.check(principal, route.message.ROUTE.name)
        async with self.inboxes[route.database].store.view() as view:
            found = await route.handler(message, view, self._envelope(message, sender=principal))
        assert isinstance(found, reply)
        return reply.from_wire(found.to_wire())

    def _envelope(self, message: Message, **more: Any) -> Envelope:
        return Envelope(id=new_id("event"), type=message.ROUTE.type, source="test", time=self.time(), **more)


@asynccontextmanager
async def running_catalogue(url: str, runs_url: str, keys: Path) -> AsyncIterator[Catalogue]:
    """A registry over two empty databases, whose secrets are sealed with the keys of this file."""
    time = Time()
    store = Store(url, RegistryUnit, SKELETON, "registry", time)
    runs = Store(runs_url, RunsUnit, RUNS_SKELETON, "registry", time)
    await migrate_new(store, "registry")
    await migrate_new(runs, "registry/runs")
    catalogue = Catalogue(store, runs, time, FileVault(keys))
    tasks = [asyncio.create_task(inbox.run()) for inbox in catalogue.inboxes.values()]
    try:
        yield catalogue
    finally:
        await end(tasks, again_s=1.0)
        await store.close()
        await runs.close()


def gateway() -> m.Principal:
    return m.Principal(kind="service", id="gateway")


def service(name: str, team_id: str) -> m.Principal:
    return m.Principal(kind="service", id=name, team_id=team_id)


def attempt_of(job: m.Job, number: int = 1) -> m.Principal:
    return m.Principal(
        kind="attempt",
        id=new_id("attempt"),
        team_id=job.team_id,
        project_id=job.project_id,
        job_id=job.id,
        attempt=number,
    )


def job_in(project: m.Project, **more: Any) -> m.Job:
    values: dict[str, Any] = {
        "team_id": project.team_id,
        "state": "queued",
        "revision": 1,
        "created_at": datetime(2026, 1, 2, tzinfo=UTC),
        "template": m.JobTemplate(name="train"),
    }
    return m.Job(id=new_id("job"), project_id=project.id, **(values | more))


def version_of(project: m.Project, **more: Any) -> m.RegisterModel:
    values: dict[str, Any] = {
        "name": "digits",
        "project_id": project.id,
        "framework": "sklearn",
        "fileset_id": new_id("fileset"),
    }
    return m.RegisterModel(**(values | more))
