"""The whole service on a real NATS server, under its own permissions, with a stand-in for the executor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from infra.local.nats import grant_for
from libs.common.bus import Bus
from libs.common.clock import utc_now
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Kind, Message
from libs.common.contracts.messages import (
    Execution,
    ExecutionEnded,
    ExecutionPage,
    ExecutionRunning,
    Gang,
    GetJob,
    GetProject,
    Job,
    JobDetail,
    ListExecutions,
    ListNodes,
    NodePage,
    NodesReported,
    Principal,
    Project,
    Role,
    StartExecution,
    StopExecution,
    StopJob,
    SubmitJob,
)
from libs.common.contracts.subjects import COMMANDS, EVENTS, delivery_subject, subject_for
from libs.common.errors import Conflict, NotFound, Unavailable
from libs.common.ids import new_id
from libs.common.routing import INTERNAL, Route, Routes, Rule
from libs.common.service import Service
from services.scheduler.app import build
from services.scheduler.routes import routes
from services.scheduler.settings import SchedulerSettings
from services.scheduler.tables import JOBS
from tests.support.nats import NatsServer, running_nats
from tests.unit.scheduler.cases import PROJECT, TEAM, template
from tests.unit.scheduler.world import USER, node

ROUTES = routes()

pytestmark = pytest.mark.integration

FROM_SCHEDULER = Rule(role=None, scope="internal", services=frozenset({"scheduler"}))


async def nothing(*_arguments: Any) -> None:
    raise AssertionError("the stand-in subscribes by hand")


EXECUTOR = Routes(
    "executor",
    (
        Route(StartExecution, nothing, INTERNAL),
        Route(StopExecution, nothing, INTERNAL),
        Route(ListExecutions, nothing, FROM_SCHEDULER),
        Route(ListNodes, nothing, FROM_SCHEDULER),
    ),
)
REGISTRY = Routes("registry", (Route(GetProject, nothing, FROM_SCHEDULER),))
GATEWAY = Routes("gateway", (), sends=(SubmitJob, StopJob, GetJob))


class StandIn:
    """An executor that runs nothing: takes commands, and says what a test tells it to."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.known: dict[str, Execution] = {}
        self.commands: asyncio.Queue[Message] = asyncio.Queue()
        self.nodes: tuple[Any, ...] = ()

    async def start(self) -> None:
        await self.bus.start()
        subject = delivery_subject("executor", COMMANDS)
        await self.bus.client.subscribe(subject, queue="executor", cb=self._take)
        await self._answer(ListExecutions, lambda asked: ExecutionPage(items=self._known_of(asked)))
        await self._answer(ListNodes, lambda _asked: NodePage(items=self.nodes))

    def _known_of(self, asked: ListExecutions) -> tuple[Execution, ...]:
        return tuple(self.known[item] for item in asked.attempt_ids if item in self.known)

    async def _take(self, raw: Any) -> None:
        kinds = {message.ROUTE.type: message for message in (StartExecution, StopExecution)}
        self.commands.put_nowait(kinds[raw.headers["ce-type"]].from_wire(raw.data))
        await raw.ack()

    async def _answer(self, question: type[Message], reply: Any) -> None:
        async def answer(raw: Any) -> None:
            await raw.respond(reply(question.from_wire(raw.data)).to_wire())

        await self.bus.client.subscribe(subject_for(question), cb=answer)

    async def next_command(self) -> Message:
        async with asyncio.timeout(60):
            return await self.commands.get()

    async def say(self, message: Message, team: str = TEAM) -> None:
        assert message.ROUTE.kind is Kind.EVENT
        envelope = Envelope(
            id=new_id("event"), type=message.ROUTE.type, source="executor", time=utc_now(), team_id=team
        )
        subject = subject_for(type(message), team=team)
        await self.bus.publish_stored(EVENTS, subject, envelope.headers(), message.to_wire())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    everybody = [grant_for(routes) for routes in (ROUTES, EXECUTOR, REGISTRY, GATEWAY)]
    with running_nats(tmp_path / "nats", everybody) as server:
        yield server


@asynccontextmanager
async def running_scheduler(server: NatsServer, database_url: str, home: Path) -> AsyncIterator[Service]:
    settings = SchedulerSettings(
        home=home,
        nats_url=server.url,
        nats_keys=server.folder / "keys",
        database_url=database_url,
        reconcile_s=0.2,
        attempt_check_s=0.5,
    )
    service = build(settings)
    async with service.running():
        yield service


@pytest.fixture
async def executor(server: NatsServer) -> AsyncIterator[StandIn]:
    await server.provision(ROUTES, EXECUTOR)
    stand_in = StandIn(server.bus("executor"))
    await stand_in.start()
    yield stand_in
    await stand_in.bus.stop()


@pytest.fixture
async def gateway(server: NatsServer) -> AsyncIterator[Bus]:
    bus = server.bus("gateway")
    await bus.start()
    yield bus
    await bus.stop()


async def reaches(gateway: Bus, job_id: str, state: str) -> Job:
    async with asyncio.timeout(60):
        while True:
            job = (await gateway.ask(GetJob(job_id=job_id), JobDetail, USER)).job
            if job.state == state:
                return job
            await asyncio.sleep(0.05)


async def test_a_job_goes_from_request_to_command_to_end(server, executor, gateway, database_url, tmp_path):
    async with running_scheduler(server, database_url, tmp_path):
        await executor.say(NodesReported(nodes=(node(),)))
        submit = SubmitJob(project_id=PROJECT, template=template())
        job, again = [await gateway.ask(submit, Job, USER, key="k") for _ in range(2)]
        assert job == again
        command = await executor.next_command()
        assert isinstance(command, StartExecution)
        assert command.job_id == job.id
        execution = Execution(attempt_id=command.attempt_id, job_id=job.id, number=1, state="running", revision=1)
        await executor.say(ExecutionRunning(execution=execution))
        await reaches(gateway, job.id, "running")
        done = {"state": "ended", "reason": "exited", "exit_code": 0, "revision": 2}
        await executor.say(ExecutionEnded(execution=execution.model_copy(update=done)))
        assert (await reaches(gateway, job.id, "succeeded")).exit_code == 0
        stranger = Principal(kind="user", id="u2", team_id="t9", role="owner")
        with pytest.raises(NotFound):
            await gateway.ask(GetJob(job_id=job.id), JobDetail, stranger)


async def test_a_restarted_scheduler_learns_by_asking(server, executor, gateway, database_url, tmp_path):
    executor.nodes = (node(),)
    async with running_scheduler(server, database_url, tmp_path / "a"):
        job = await gateway.ask(SubmitJob(project_id=PROJECT, template=template()), Job, USER, key="k")
        command = await executor.next_command()
    assert isinstance(command, StartExecution)
    ended = {"state": "ended", "reason": "exited", "exit_code": 0, "revision": 2}
    known = Execution(attempt_id=command.attempt_id, job_id=job.id, number=1, **ended)
    executor.known[command.attempt_id] = known
    async with running_scheduler(server, database_url, tmp_path / "b"):
        await reaches(gateway, job.id, "succeeded")


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.full)])
async def test_many_submits_at_once_lose_none_and_start_each_once(
    server, executor, gateway, database_url, tmp_path, count
):
    """Every tenth is repeated under its key while the first may still be under way; one in fifty is a gang."""
    executor.nodes = (node(cpu_count=2 * count),)
    await executor.say(NodesReported(nodes=executor.nodes))
    gang = Gang(type="torch", roles=(Role(name="worker", count=3),))

    async def submit(number: int) -> str:
        asked = template(name=f"j{number}", priority=number % 101, gang=Gang() if number % 50 else gang)
        message = SubmitJob(project_id=PROJECT, template=asked)
        while True:
            try:
                return (await gateway.ask(message, Job, USER, key=f"k{number}", timeout_s=30)).id
            except Unavailable:
                await asyncio.sleep(0.1)

    async with running_scheduler(server, database_url, tmp_path) as service:
        ids = await asyncio.gather(*map(submit, [*range(count), *range(0, count, 10)]))
        assert ids[count:] == ids[:count:10]
        # A command may come twice, but always for the same attempt.
        started: dict[str, StartExecution] = {}
        while len(started) < count:
            command = await executor.next_command()
            assert isinstance(command, StartExecution)
            assert started.setdefault(command.job_id, command) == command
        assert set(started) == set(ids)
        assert len({command.attempt_id for command in started.values()}) == count
        assert {len(command.seats) for command in started.values()} == {0, 3}
        assert await count_jobs(service) == {"starting": count}


async def count_jobs(service: Service) -> dict[str, int]:
    async with service.inbox.store.view() as view:
        rows = (await view.execute(select(JOBS.c.state, func.count().label("count")).group_by(JOBS.c.state))).all()
    return {row.state: row.count for row in rows}


async def test_a_project_closed_unheard_takes_no_more_jobs(server, executor, gateway, database_url, tmp_path):
    bus = server.bus("registry")
    await bus.start()
    archived = Project(id=PROJECT, team_id=TEAM, state="archived", revision=2)

    async def answer(raw: Any) -> None:
        await raw.respond(archived.to_wire())

    await bus.client.subscribe(subject_for(GetProject), cb=answer)

    async def submit_on() -> None:
        async with asyncio.timeout(60):
            while True:
                await gateway.ask(SubmitJob(project_id=PROJECT, template=template()), Job, USER, key=new_id("job"))
                await asyncio.sleep(0.05)

    async with running_scheduler(server, database_url, tmp_path):
        with pytest.raises(Conflict, match="archived"):
            await submit_on()
    await bus.stop()
