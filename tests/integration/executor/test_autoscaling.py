"""Ray's own autoscaler, with nodes that it starts and takes away on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from libs.common.contracts.messages import Demand, DemandChanged, LogSealed, Node, Resources
from services.executor.routes import routes
from services.executor.settings import ExecutorSettings
from tests.integration.executor.on_ray import Onlooker, running, start
from tests.integration.executor.world import Neighbours, ObjectStore, grants, meet_neighbours, until
from tests.support.leftovers import installation_folder
from tests.support.nats import NatsServer, running_nats
from tests.support.ray import RayHead, autoscaling_ray

pytestmark = [pytest.mark.integration, pytest.mark.full, pytest.mark.timeout(300)]


@pytest.fixture
def ray_head() -> Iterator[RayHead]:
    with autoscaling_ray({"CPU": 8, "object_store_memory": 78643200}, most=2, idle_minutes=0.1) as head:
        yield head


@pytest.fixture
def home() -> Iterator[Path]:
    with installation_folder() as folder:
        yield folder


@pytest.fixture
def server(home: Path) -> Iterator[NatsServer]:
    with running_nats(home / "nats", grants()) as running:
        yield running


@pytest.fixture
async def neighbours(server: NatsServer) -> AsyncIterator[Neighbours]:
    await server.provision(routes())
    store = ObjectStore()
    met = await meet_neighbours(server, store)
    yield met
    await met.client.close()
    store.close()


async def test_demand_brings_a_node_and_its_end_lets_the_node_go(
    home: Path, server: NatsServer, ray_head: RayHead, neighbours: Neighbours
) -> None:
    settings = ExecutorSettings(
        home=home,
        nats_url=server.url,
        nats_keys=server.folder / "keys",
        ray_address=ray_head.address,
        front_door=neighbours.objects.url,
        reconcile_s=1.0,
        look_s=0.5,
        keep_folder_s=0.0,
        autoscale_limit=1,
        autoscale_idle_s=4.0,
    )
    onlooker = Onlooker()
    await onlooker.listen(neighbours)

    async def large(state: str) -> Node | None:
        return next((node for node in onlooker.nodes if (node.cpu_count, node.state) == (8, state)), None)

    async def want(count: int) -> None:
        demands = (Demand(resources=Resources(cpu_count=8), count=count),) if count else ()
        await neighbours.send(DemandChanged(demands=demands), "demand")

    async with running(settings):
        await until(lambda: asyncio.sleep(0, onlooker.nodes), 60)
        await want(5)
        node: Node = await until(lambda: large("ready"), 120)
        asked = start(node.id, "echo $NABLA_NODE_ID")
        await neighbours.send(asked, asked.attempt_id)
        assert (await onlooker.end_of(asked.attempt_id)).exit_code == 0
        # One was asked for at most, whatever waits.
        assert sum(each.cpu_count == 8 for each in onlooker.nodes) == 1
        await neighbours.send(LogSealed(job_id=asked.job_id), asked.job_id)
        await want(0)
        await until(lambda: large("resting"), 60)
        await until(lambda: large("gone"), 120)
