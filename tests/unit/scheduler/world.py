"""A scheduler without a bus: its real store, inbox, placer and reconciler, and a clock that a test turns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    Execution,
    GetJob,
    Job,
    JobDetail,
    Node,
    NodePage,
    NodesReported,
    Principal,
    Project,
    SubmitJob,
)
from libs.common.errors import Refusal, Unavailable
from libs.common.ids import new_id
from libs.common.inbox import Inbox
from libs.common.routing import Route
from libs.common.waiting import end
from services.scheduler.handlers import get_job
from services.scheduler.loops.placer import Placer
from services.scheduler.loops.reconciler import Patience, Reconciler
from services.scheduler.routes import routes
from services.scheduler.store import SchedulerStore
from services.scheduler.tables import SKELETON
from tests.support.databases import migrate_new
from tests.unit.scheduler.cases import PROJECT, TEAM, template

ROUTES = routes()

USER = Principal(kind="user", id="u1", name="ada", team_id=TEAM, role="member")


def node(node_id: str = "node1", **fields: Any) -> Node:
    return Node(**({"id": node_id, "state": "ready", "cpu_count": 4, "memory_bytes": 8 << 30} | fields))


class FakeExecutor:
    """An executor that answers what a test put in."""

    def __init__(self) -> None:
        self.known: dict[str, Execution] = {}
        self.inventory: NodePage | None = None
        self.asked: list[str] = []
        self.refusals: dict[str, Refusal] = {}

    async def executions(self, team_id: str, attempt_ids: Sequence[str]) -> tuple[Execution, ...]:
        assert team_id
        self.asked += attempt_ids
        if team_id in self.refusals:
            raise self.refusals[team_id]
        return tuple(self.known[attempt_id] for attempt_id in attempt_ids if attempt_id in self.known)

    async def nodes(self) -> NodePage:
        if self.inventory is None:
            raise Unavailable("service_silent", "The executor service did not answer.")
        return self.inventory


class FakeRegistry:
    """A registry that answers what a test put in."""

    def __init__(self) -> None:
        self.projects: dict[str, Project] = {}
        self.asked: list[str] = []
        self.refusals: list[Refusal] = []

    async def project(self, team_id: str, project_id: str) -> Project | None:
        self.asked.append(project_id)
        if self.refusals:
            raise self.refusals.pop(0)
        found = self.projects.get(project_id)
        return found if found and found.team_id == team_id else None


class World:
    def __init__(self, url: str) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.url = url
        self.executor = FakeExecutor()
        self.registry = FakeRegistry()
        self.registry.projects[PROJECT] = Project(id=PROJECT, team_id=TEAM, state="active", revision=1)
        self._start()

    def _start(self) -> None:
        self.store = SchedulerStore(self.url, clock=lambda: self.now)
        self.inbox = Inbox(self.store, "scheduler")
        self.placer = Placer(self.store, silent_s=30, pass_s=5, clock=lambda: self.now)
        patience = Patience(pass_s=5, silent_s=30, attempt_s=15, project_s=60)
        self.reconciler = Reconciler(
            self.store, self.executor, self.registry, self.placer.policy, patience, clock=lambda: self.now
        )
        self._running = asyncio.create_task(self.inbox.run())

    async def open(self) -> World:
        await migrate_new(self.store, "scheduler")
        return self

    async def close(self) -> None:
        await end([self._running], again_s=1.0)
        await self.store.close()

    async def restart(self) -> None:
        """What SIGKILL and a new start leave: the database, and nothing of memory."""
        await self.close()
        self._start()
        await self.placer.rebuild()

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    async def request(self, message: Message, principal: Principal = USER, key: str = "") -> Any:
        """The decoded answer of a request; its rule is checked as the bus would."""
        route = self._route(message)
        route.rule.check(principal, message.ROUTE.name)
        envelope = self._envelope(message, sender=principal, idempotency_key=key, team_id=principal.team_id)
        answer = await self.inbox.apply(route, message, envelope)
        return json.loads(answer.body)

    async def deliver(self, message: Message, *, times: int = 2, source: str = "executor", team: str = TEAM) -> None:
        """The same event or command, as often as the bus likes to repeat it."""
        envelope = self._envelope(message, source=source, team_id=team)
        for _ in range(times):
            await self.inbox.apply(self._route(message), message, envelope)

    async def query(self, message: Message, principal: Principal = USER) -> Any:
        route = self._route(message)
        route.rule.check(principal, message.ROUTE.name)
        async with self.store.view() as view:
            return await route.handler(message, view, self._envelope(message, sender=principal))

    def _route(self, message: Message) -> Route:
        route = ROUTES.find(message.ROUTE.kind, message.ROUTE.type)
        assert route
        return route

    def _envelope(self, message: Message, **fields: Any) -> Envelope:
        values = {"id": new_id("event"), "type": message.ROUTE.type, "source": "gateway", "time": self.now}
        return Envelope(**(values | fields))

    async def submit(self, principal: Principal = USER, **fields: Any) -> str:
        message = SubmitJob(project_id=PROJECT, template=template(**fields))
        return str((await self.request(message, principal))["id"])

    async def report_nodes(self, *nodes: Node, detail: str = "", times: int = 1) -> None:
        self.wait(0.001)
        await self.deliver(NodesReported(nodes=nodes, detail=detail), times=times)

    async def place(self) -> int:
        return await self.placer.place_waiting()

    async def running_job(self, **fields: Any) -> str:
        """A job that was placed; the executor has said nothing of it yet."""
        await self.report_nodes(node())
        job_id = await self.submit(**fields)
        await self.place()
        return job_id

    async def job(self, job_id: str) -> Job:
        return (await self.detail(job_id)).job

    async def detail(self, job_id: str) -> JobDetail:
        async with self.store.view() as view:
            case = await view.find(job_id)
            assert case
            principal = Principal(kind="user", id="u", team_id=case.job.team_id, role="owner")
            return await get_job(GetJob(job_id=job_id), view, self._envelope(GetJob(), sender=principal))

    async def outbox(self) -> list[tuple[str, dict[str, Any]]]:
        """Everything ever emitted: name and body."""
        table = SKELETON.outbox
        async with self.store.view() as view:
            rows = (await view.execute(select(table.c.headers, table.c.body).order_by(table.c.id))).all()
        return [(json.loads(row.headers)["ce-type"].removesuffix(".v1"), json.loads(row.body)) for row in rows]

    async def names(self) -> list[str]:
        return [name for name, _ in await self.outbox()]
