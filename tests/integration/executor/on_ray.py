"""An executor on a real cluster, seen from its neighbours."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from libs.common.contracts.messages import (
    ExecutionEnded,
    JobTemplate,
    Node,
    NodesReported,
    StartExecution,
)
from libs.common.ids import new_id
from libs.common.service import Service
from services.executor.app import build
from services.executor.settings import ExecutorSettings
from tests.integration.executor.world import Neighbours, until


@asynccontextmanager
async def running(settings: ExecutorSettings) -> AsyncIterator[Service]:
    service = build(settings)
    async with service.running():
        yield service


class Onlooker:
    """Hears events as they are published."""

    def __init__(self) -> None:
        self.nodes: tuple[Node, ...] = ()
        self.detail = ""
        self.ended: dict[str, ExecutionEnded] = {}

    async def listen(self, neighbours: Neighbours) -> None:
        async def hear(raw) -> None:  # type: ignore[no-untyped-def]
            if raw.subject.endswith(NodesReported.ROUTE.type):
                report = NodesReported.from_wire(raw.data)
                self.nodes, self.detail = report.nodes, report.detail
            elif raw.subject.endswith(ExecutionEnded.ROUTE.type):
                event = ExecutionEnded.from_wire(raw.data)
                self.ended[event.execution.attempt_id] = event

        await neighbours.client.subscribe("nabla.evt.>", cb=hear)

    async def ready_node(self) -> str:
        async def find() -> str:
            return next((node.id for node in self.nodes if node.state == "ready"), "")

        found: str = await until(find, 40)
        return found

    async def end_of(self, attempt_id: str, timeout_s: float = 60):  # type: ignore[no-untyped-def]
        async def find() -> ExecutionEnded | None:
            return self.ended.get(attempt_id)

        return (await until(find, timeout_s)).execution


def start(node_id: str, *command: str, **template: object) -> StartExecution:
    return StartExecution(
        attempt_id=new_id("attempt"),
        job_id=new_id("job"),
        number=1,
        node_id=node_id,
        template=JobTemplate(command=command, **template),
    )


async def stdout(neighbours: Neighbours, job_id: str) -> list[str]:
    return [line.text for line in await neighbours.log(job_id) if line.stream == "stdout"]
