"""One cluster of three nodes: each with its own folder, agent and fate."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from libs.common.clock import utc_now
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    DrainNode,
    Execution,
    LogSealed,
    Node,
    Resources,
    StartExecution,
    StopExecution,
)
from libs.common.ids import new_id
from libs.common.service import Service
from services.executor.adapters.cluster.ray_cluster import connect
from services.executor.adapters.cluster.ray_nodes import GPU_MEMORY_LABEL, GPU_MODEL_LABEL
from services.executor.app import agent_config
from services.executor.handlers import drain_node
from services.executor.routes import routes
from services.executor.settings import ExecutorSettings
from tests.integration.executor.on_ray import Onlooker, running, start, stdout
from tests.integration.executor.world import TEAM, Neighbours, ObjectStore, grants, meet_neighbours, until
from tests.support.leftovers import installation_folder, left_by, reserved_in
from tests.support.nats import NatsServer, running_nats
from tests.support.ray import RayHead, RayNode, running_ray

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def ray_head() -> Iterator[RayHead]:
    with running_ray() as head:
        yield head


@pytest.fixture(scope="module")
def near(ray_head: RayHead) -> Iterator[RayNode]:
    with joined(ray_head, "near") as node:
        yield node


@pytest.fixture(scope="module")
def fast(ray_head: RayHead) -> Iterator[RayNode]:
    labels = {GPU_MODEL_LABEL: "H100", GPU_MEMORY_LABEL: "85899345920"}
    with joined(ray_head, "fast", gpus=4, labels=labels) as node:
        yield node


@contextmanager
def joined(head: RayHead, name: str, **facts) -> Iterator[RayNode]:  # type: ignore[no-untyped-def]
    node = head.join(name, **facts)
    try:
        yield node
    finally:
        node.kill()


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with installation_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[NatsServer]:
    with running_nats(home / "nats", grants()) as running:
        yield running


@pytest.fixture(scope="module")
def objects() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.close()


@pytest.fixture
async def neighbours(server: NatsServer, objects: ObjectStore) -> AsyncIterator[Neighbours]:
    await server.provision(routes())
    met = await meet_neighbours(server, objects)
    yield met
    await met.client.close()


@pytest.fixture
async def onlooker(neighbours: Neighbours) -> Onlooker:
    looking = Onlooker()
    await looking.listen(neighbours)
    return looking


@pytest.fixture
def settings(home: Path, server: NatsServer, ray_head: RayHead, objects: ObjectStore) -> ExecutorSettings:
    return ExecutorSettings(
        home=home,
        nats_url=server.url,
        nats_keys=server.folder / "keys",
        ray_address=ray_head.address,
        front_door=objects.url,
        node_fence_s=10.0,
        reconcile_s=1.0,
        look_s=0.5,
        keep_folder_s=0.0,
    )


async def nodes_when(onlooker: Onlooker, count: int, state: str = "ready") -> list[Node]:
    """All nodes in this state, once there are so many."""

    async def enough() -> list[Node]:
        found = [node for node in onlooker.nodes if node.state == state]
        return found if len(found) >= count else []

    found: list[Node] = await until(enough, 60)
    return found


def node_with(nodes: list[Node], gpus: float) -> Node:
    return next(node for node in nodes if node.gpu_count == gpus)


async def test_each_node_has_its_agent_its_facts_and_its_folder(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker, near: RayNode, fast: RayNode, home: Path
) -> None:
    async with running(settings):
        nodes = await nodes_when(onlooker, 3)
        strong = node_with(nodes, 4)
        assert (strong.gpu_model, strong.gpu_memory_bytes, strong.address) == ("H100", 85899345920, "127.0.0.1")
        asked = [start(node.id, "echo $NABLA_NODE_ID") for node in nodes]
        for each in asked:
            await neighbours.send(each, each.attempt_id)
        ends = [await onlooker.end_of(each.attempt_id) for each in asked]
        assert [end.node_id for end in ends] == [node.id for node in nodes]
        assert [await stdout(neighbours, each.job_id) for each in asked] == [[node.id] for node in nodes]
        for node_dir in (near.node_dir, fast.node_dir, home / "node"):
            assert (node_dir / "agent.lock").exists()
        await all_cleaned_up(neighbours, asked, [near.node_dir, fast.node_dir, home / "node"])
    await nothing_reserved(settings, asked)


async def all_cleaned_up(neighbours: Neighbours, asked: Sequence[StartExecution], node_dirs: Sequence[Path]) -> None:
    """Once the logs are stored, no process, mount, group or folder of these attempts is left."""
    for each in asked:
        await neighbours.send(LogSealed(job_id=each.job_id), each.job_id)
    attempt_ids = [each.attempt_id for each in asked]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(40):
            while left_by(attempt_ids, node_dirs):
                await asyncio.sleep(0.2)
    assert left_by(attempt_ids, node_dirs) == []


async def nothing_reserved(settings: ExecutorSettings, asked: Sequence[StartExecution]) -> None:
    """To be asked when the executor has gone: two in one process would share Ray's one connection."""
    cluster = connect(settings.find_ray_address, agent_config(settings), settings.ray_namespace)
    try:
        assert reserved_in(await cluster.reserved(), [each.attempt_id for each in asked]) == []
    finally:
        await cluster.close()


async def drain(service: Service, node_id: str, undo: bool = False) -> None:
    call = Envelope(id=new_id("event"), type=DrainNode.ROUTE.type, source="test", time=utc_now(), team_id=TEAM)
    await service.store.run(lambda unit: drain_node(DrainNode(node_id=node_id, undo=undo), unit, call))


async def test_a_draining_node_finishes_its_work_loses_its_agent_and_gets_it_back(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker, near: RayNode, fast: RayNode
) -> None:
    async with running(settings) as service:
        node = node_with(await nodes_when(onlooker, 3), 0)
        asked = start(node.id, "echo up; while [ ! -e /storage/go ]; do sleep 0.1; done; echo done")
        await neighbours.send(asked, asked.attempt_id)
        await until(lambda: stdout(neighbours, asked.job_id))
        await drain(service, node.id)

        async def told() -> bool:
            return any(each.draining and each.state == "ready" for each in onlooker.nodes)

        await until(told, 30)
        assert near.has_agent()
        (settings.storage_folder / TEAM / "go").touch()
        assert (await onlooker.end_of(asked.attempt_id)).exit_code == 0
        assert await stdout(neighbours, asked.job_id) == ["up", "done"]
        await neighbours.send(LogSealed(job_id=asked.job_id), asked.job_id)
        (resting,) = await nodes_when(onlooker, 1, "resting")
        assert resting.id == node.id
        await until(lambda: asyncio.to_thread(lambda: not near.has_agent()), 30)
        assert list((near.node_dir / "attempts").iterdir()) == []
        await drain(service, node.id, undo=True)
        await nodes_when(onlooker, 3)
        again = start(node.id, "echo back")
        await neighbours.send(again, again.attempt_id)
        assert (await onlooker.end_of(again.attempt_id)).exit_code == 0


@pytest.mark.full
async def test_a_killed_agent_is_back_and_its_job_never_noticed(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker, near: RayNode, fast: RayNode
) -> None:
    async with running(settings):
        node = node_with(await nodes_when(onlooker, 3), 4)
        asked = start(node.id, "for i in $(seq 60); do echo $i; sleep 0.1; done", resources=Resources(gpu_count=1))
        await neighbours.send(asked, asked.attempt_id)
        await until(lambda: stdout(neighbours, asked.job_id))
        before = fast.agent_pid()
        os.kill(before, signal.SIGKILL)
        end = await onlooker.end_of(asked.attempt_id)
        assert (end.reason, end.exit_code, end.node_id) == ("exited", 0, node.id)
        assert await stdout(neighbours, asked.job_id) == [str(number) for number in range(1, 61)]
        await until(lambda: asyncio.to_thread(fast.has_agent), 30)
        assert fast.agent_pid() != before


@pytest.mark.full
async def test_a_killed_raylet_costs_its_own_jobs_alone(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker, ray_head: RayHead, near: RayNode
) -> None:
    with ExitStack() as stack:
        doomed = stack.enter_context(joined(ray_head, "doomed", gpus=8))
        async with running(settings):

            async def found() -> Node | None:
                return next((node for node in onlooker.nodes if (node.gpu_count, node.state) == (8, "ready")), None)

            doomed_node: Node = await until(found, 60)
            other = node_with(await nodes_when(onlooker, 3), 0)
            gone = start(doomed_node.id, "echo up; trap '' TERM; sleep 600")
            stays = start(other.id, "echo up; sleep 600")
            for each in (gone, stays):
                await neighbours.send(each, each.attempt_id)
            for each in (gone, stays):
                await until(partial(stdout, neighbours, each.job_id))
            os.kill(doomed.raylet_pid(), signal.SIGKILL)
            began = asyncio.get_running_loop().time()
            end = await onlooker.end_of(gone.attempt_id, 120)
            # Not before the node itself has ended it: its fence, and then the margin.
            assert asyncio.get_running_loop().time() - began >= settings.node_fence_s + 30
            assert end.reason == "lost"
            assert left_by([gone.attempt_id], []) == []
            assert stays.attempt_id not in onlooker.ended
            await neighbours.send(StopExecution(attempt_id=stays.attempt_id, reason="enough"), stays.attempt_id)
            assert (await onlooker.end_of(stays.attempt_id)).reason == "stopped"


@pytest.mark.full
async def test_an_attempt_that_the_database_forgot_is_taken_up_and_can_be_stopped(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker, near: RayNode, fast: RayNode
) -> None:
    """The database is new, as after a disaster: what runs is taken up, and can be stopped."""
    async with running(settings):
        node = node_with(await nodes_when(onlooker, 3), 0)
        asked = start(node.id, "echo up; sleep 600")
        await neighbours.send(asked, asked.attempt_id)
        await until(lambda: stdout(neighbours, asked.job_id))
    async with running(
        settings.model_copy(update={"database_url": f"sqlite:///{settings.home}/restored.db"})
    ) as service:

        async def taken_up() -> Execution | None:
            async with service.store.view() as view:
                row = await view.execution(asked.attempt_id)
                return row.snapshot() if row and row.state == "running" else None

        found: Execution = await until(taken_up, 60)
        assert (found.job_id, found.node_id, found.team_id) == (asked.job_id, node.id, TEAM)
        await neighbours.send(StopExecution(attempt_id=asked.attempt_id, reason="cancelled"), asked.attempt_id)
        end = await onlooker.end_of(asked.attempt_id)
    assert (end.reason, end.detail) == ("stopped", "cancelled")
