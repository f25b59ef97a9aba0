"""An executor without its bus, for unit tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from libs.common.clock import utc_now
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    MESSAGES,
    JobTemplate,
    Principal,
    StartExecution,
)
from libs.common.errors import Refusal
from libs.common.ids import new_id
from libs.common.store import Store
from services.executor.loops import Driver, Sweeper, Watcher
from services.executor.routes import routes
from services.executor.settings import ExecutorSettings
from services.executor.store import SKELETON, ExecutionRow, ExecutorUnit
from tests.unit.executor.fake_cluster import NODE, FakeCluster

TEAM = "t0team"
SERVICE = Principal(kind="service", id="scheduler", team_id=TEAM)


class FakeLogs:
    """Storage, as far as it is asked."""

    def __init__(self) -> None:
        self.sealed: set[str] = set()
        self.asked: list[str] = []
        self.refusals: list[Refusal] = []

    async def is_sealed(self, team_id: str, job_id: str) -> bool:
        assert team_id == TEAM
        self.asked.append(job_id)
        if self.refusals:
            raise self.refusals.pop(0)
        return job_id in self.sealed


@dataclass
class Bench:
    """An executor without its bus: messages go in, outbox rows come out."""

    store: Store[ExecutorUnit]
    cluster: FakeCluster
    settings: ExecutorSettings
    now_s: float = 1000.0

    def __post_init__(self) -> None:
        self.driver = Driver(self.store, self.cluster, self.settings)
        self.watcher = Watcher(self.store, self.cluster, self.settings, self.driver.wake, lambda: self.now_s)
        self.logs = FakeLogs()
        self.sweeper = Sweeper(self.store, self.cluster, self.logs, self.settings, self.driver.wake)

    async def deliver(self, message: Message, **envelope: Any) -> None:
        """The same delivery twice, as the bus may do."""
        route = next(route for route in routes().routes if route.message is type(message))
        call = self.envelope(message, SERVICE, **envelope)
        for _ in range(2):
            outcomes = await self.store.run(lambda unit: self._apply(unit, route.handler, message, call))
            assert outcomes is None

    def envelope(self, message: Message, sender: Principal, **fields: Any) -> Envelope:
        return Envelope(
            id=new_id("event"),
            type=message.ROUTE.type,
            source="test",
            time=utc_now(),
            team_id=fields.pop("team_id", TEAM),
            sender=sender,
            **fields,
        )

    async def _apply(self, unit: ExecutorUnit, handler: Any, message: Message, call: Envelope) -> None:
        await handler(message, unit, call)

    async def work(self) -> None:
        """Visits until nothing is due."""
        for _ in range(6):
            await self.driver.look_for_work()
            await self.driver.settle()

    async def row(self, attempt_id: str) -> ExecutionRow:
        async with self.store.view() as view:
            found = await view.execution(attempt_id)
        assert found
        return found

    async def emitted(self) -> list[tuple[str, Message]]:
        outbox = SKELETON.outbox
        async with self.store.view() as view:
            rows = (await view.execute(select(outbox).order_by(outbox.c.id))).all()
        found = []
        for row in rows:
            name = row.subject.split(".", 3)[3]
            kind = next(each for each in MESSAGES if hasattr(each, "ROUTE") and each.ROUTE.type == name)
            found.append((name.removesuffix(".v1"), kind.from_wire(row.body)))
        return found

    async def names(self) -> list[str]:
        return [name for name, _ in await self.emitted() if name != "node.reported"]


def start(**changes: Any) -> StartExecution:
    values: dict[str, Any] = {
        "attempt_id": new_id("attempt"),
        "job_id": new_id("job"),
        "number": 1,
        "project_id": "pr0",
        "node_id": NODE,
        "template": JobTemplate(command=("echo hello",)),
    }
    return StartExecution(**values | changes)
