"""Serving with its world faked: peers, health and proxy of a few lines each, on a real store."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    Attempt,
    CreateDeployment,
    Deployment,
    GetDeployment,
    Job,
    JobRunning,
    Principal,
)
from libs.common.errors import Unavailable
from libs.common.ids import new_id
from libs.common.routing import Route, Routes
from libs.common.store import Store
from services.serving.adapters.vault import FileKeyVault
from services.serving.domain.front import Backend, Base, Config, Pass
from services.serving.domain.templates import Programs
from services.serving.handlers import Handlers
from services.serving.loops import Front, Reconciler
from services.serving.routes import routes
from services.serving.steps import Steps
from services.serving.store import SKELETON, ServingUnit
from tests.support.databases import migrate_new

TEAM = "t1"
MEMBER = Principal(kind="user", id="u1", team_id=TEAM, role="member")
VIEWER = MEMBER.model_copy(update={"id": "u2", "role": "viewer"})
STRANGER = Principal(kind="user", id="u3", team_id="t2", role="owner")
BASE = Base("http://127.0.0.1:8080", "apps.localhost", "http://127.0.0.1:7000", "http://127.0.0.1:8333", "nabla")
CREATE = CreateDeployment(
    name="digits",
    project_id="pr1",
    model_id="mo1",
    model_name="digits",
    model_version=3,
    framework="sklearn",
    model_fileset_id="fs1",
)


@dataclass
class FakePeers:
    """What scheduler and storage would say; `silent` is when they do not answer."""

    jobs: dict[str, Job] = field(default_factory=dict)
    bentos: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    silent: bool = False
    asked: list[str] = field(default_factory=list)

    async def job(self, job_id: str, team_id: str) -> Job | None:
        self.asked.append(job_id)
        return self._answer(self.jobs.get(job_id))

    async def bento_of(self, build_job_id: str, team_id: str) -> str:
        return str(self._answer(self.bentos.get(build_job_id, "")))

    async def last_lines(self, job_id: str, team_id: str, count: int) -> tuple[list[str], bool]:
        return self._answer((self.lines[-count:], True))

    def _answer(self, value: Any) -> Any:
        if self.silent:
            raise Unavailable("service_silent", "silent")
        return value


@dataclass
class FakeHealth:
    healthy: set[str] = field(default_factory=set)

    async def ready(self, backend: Backend, shown: Pass | None) -> bool:
        return backend.url.removeprefix("http://") in self.healthy


PASS = Pass("certificate", "key", "authority")


@dataclass
class FakePasses:
    """`away` is when the executor does not answer."""

    away: bool = False

    async def front_door(self) -> Pass:
        if self.away:
            raise Unavailable("no_answer", "The executor does not answer.")
        return PASS


@dataclass
class FakeProxy:
    """Remembers what it was given; `behind` is when it does not show it."""

    config: Config = field(default_factory=dict)
    behind: bool = False

    async def publish(self, config: Config) -> None:
        self.config = config
        if self.behind:
            raise Unavailable("proxy_behind", "Traefik does not show the new routes.")

    def servers(self, name: str) -> list[str] | None:
        """Where requests for this deployment go; None when there is no route at all."""
        service = self.config.get("http", {}).get("services", {}).get(f"d-{name}")
        return [server["url"] for server in service["loadBalancer"]["servers"]] if service else None


@dataclass
class Serving:
    """The service without its bus: messages are applied as the inbox does, looks are taken by hand."""

    store: Store[ServingUnit]
    handlers: Handlers
    peers: FakePeers
    health: FakeHealth
    proxy: FakeProxy
    reconciler: Reconciler
    front: Front
    passes: FakePasses
    now: list[datetime]
    job_revisions: Any = field(default_factory=lambda: itertools.count(1))

    @property
    def routes(self) -> Routes:
        return routes(self.handlers)

    def route(self, message: Message) -> Route:
        found = self.routes.find(message.ROUTE.kind, message.ROUTE.type)
        assert found
        return found

    async def send(self, message: Message, sender: Principal = MEMBER) -> Any:
        """Rule, then handler, in one unit of work."""
        route = self.route(message)
        envelope = envelope_for(message, sender)
        if route.rule.scope != "internal":
            route.rule.check(sender, message.ROUTE.name)
        work: Callable[[ServingUnit], Awaitable[Any]] = lambda unit: route.handler(message, unit, envelope)  # noqa: E731
        return await self.store.run(work)

    async def deployment(self, name: str = "digits", sender: Principal = MEMBER) -> Deployment:
        found: Deployment = await self.send(GetDeployment(deployment_id=name), sender)
        return found

    async def look(self, passes: int = 1) -> None:
        for _ in range(passes):
            await self.reconciler.run_pass()

    def pass_time(self, seconds: float) -> None:
        self.now[0] += timedelta(seconds=seconds)

    async def job_is(self, event: type[Any], job_id: str, state: str, **changes: Any) -> None:
        """The scheduler's event about a job of ours."""
        job = Job(id=job_id, team_id=TEAM, state=state, revision=next(self.job_revisions), **changes)
        self.peers.jobs[job_id] = job
        await self.send(event(job=job))

    async def replica_runs(self, address: str) -> str:
        """The present replica job runs at `address`; answers its id."""
        job_id = (await self.deployment()).revision.replica_job_id
        port = (await self.ordered(job_id)).port
        await self.job_is(JobRunning, job_id, "running", attempt=Attempt(addresses={str(port): address}))
        return job_id

    async def ordered(self, job_id: str) -> Any:
        async with self.store.view() as view:
            return await view.job(job_id)

    async def emitted(self) -> list[tuple[str, dict[str, Any]]]:
        """Type and body of all that left so far, in order."""
        import json

        outbox = self.store.skeleton.outbox
        async with self.store.view() as view:
            rows = (await (await view.session.connection()).execute(select(outbox).order_by(outbox.c.id))).all()
        return [(json.loads(row.headers)["ce-type"], json.loads(row.body)) for row in rows]

    async def types(self) -> list[str]:
        return [kind.removesuffix(".v1") for kind, _ in await self.emitted()]


def envelope_for(message: Message, sender: Principal, key: str = "") -> Envelope:
    return Envelope(
        id=new_id("event"),
        type=message.ROUTE.type,
        source="test",
        time=datetime.now(UTC),
        team_id=sender.team_id,
        idempotency_key=key,
        sender=sender,
    )


@asynccontextmanager
async def serving_on(database_url: str, folder: Path) -> AsyncIterator[Serving]:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    store = Store(database_url, ServingUnit, SKELETON, "serving", clock=lambda: now[0])
    await migrate_new(store, "serving")
    programs = Programs(build="build", replica="replica", endpoint="endpoint")
    peers, health, proxy = FakePeers(), FakeHealth(), FakeProxy()
    passes = FakePasses()
    front = Front(store, proxy, lambda: BASE, passes)
    ports = itertools.count(20_000)
    reconciler = Reconciler(
        store,
        Steps(store, programs, lambda: next(ports)),
        front,
        peers,
        health,
        ask_every_s=5.0,
        clock=lambda: now[0],
    )
    handlers = Handlers(FileKeyVault(folder / "serving.key"), programs, BASE.apps_domain)
    yield Serving(store, handlers, peers, health, proxy, reconciler, front, passes, now)
    await store.close()
