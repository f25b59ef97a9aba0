"""A node that is cut off by a real link: its own fence first, the executor's verdict after, and a clean return."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from libs.common.contracts.messages import LogSealed, Node
from services.executor.domain.inventory import LOST_MARGIN_S
from services.executor.routes import routes
from services.executor.settings import ExecutorSettings
from tests.integration.executor.on_ray import Onlooker, running, start, stdout
from tests.integration.executor.world import Neighbours, ObjectStore, grants, meet_neighbours, until
from tests.support.leftovers import installation_folder, left_by
from tests.support.links import Link, linked_namespace, why_no_links
from tests.support.nats import NatsServer, running_nats
from tests.support.ray import RayHead, RayNode, running_ray

WHY_NOT = why_no_links()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.full,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
FENCE_S = 10.0


@pytest.fixture
def link() -> Iterator[Link]:
    with linked_namespace() as made:
        yield made


@pytest.fixture
def ray_head(link: Link) -> Iterator[RayHead]:
    with running_ray(link.here) as head:
        yield head


@pytest.fixture
def far(ray_head: RayHead, link: Link) -> Iterator[RayNode]:
    node = ray_head.join("far", gpus=4, address=link.there, inside=link.inside)
    yield node
    node.kill()


@pytest.fixture
def home() -> Iterator[Path]:
    with installation_folder() as folder:
        yield folder


@pytest.fixture
def server(home: Path, link: Link) -> Iterator[NatsServer]:
    with running_nats(home / "nats", grants(), host="0.0.0.0") as running:
        yield running


@pytest.fixture
async def neighbours(server: NatsServer) -> AsyncIterator[Neighbours]:
    await server.provision(routes())
    store = ObjectStore()
    met = await meet_neighbours(server, store)
    yield met
    await met.client.close()
    store.close()


@pytest.fixture
async def onlooker(neighbours: Neighbours) -> Onlooker:
    looking = Onlooker()
    await looking.listen(neighbours)
    return looking


async def test_a_node_that_is_cut_off_ends_its_jobs_before_they_are_called_lost(
    home: Path,
    server: NatsServer,
    ray_head: RayHead,
    link: Link,
    far: RayNode,
    neighbours: Neighbours,
    onlooker: Onlooker,
) -> None:
    settings = ExecutorSettings(
        home=home,
        nats_url=server.url,
        nats_keys=server.folder / "keys",
        ray_address=ray_head.address,
        front_door=neighbours.objects.url,
        node_nats_url=f"nats://{link.here}:{server.port}",
        node_fence_s=FENCE_S,
        reconcile_s=1.0,
        look_s=0.5,
        keep_folder_s=0.0,
        revisit_s=2.0,
    )

    async def far_node() -> Node | None:
        return next((node for node in onlooker.nodes if (node.gpu_count, node.state) == (4, "ready")), None)

    async with running(settings):
        node: Node = await until(far_node, 60)
        assert node.address == link.there
        asked = start(node.id, "echo up; trap '' TERM; sleep 600")
        await neighbours.send(asked, asked.attempt_id)
        await until(lambda: stdout(neighbours, asked.job_id))
        clock_s = asyncio.get_running_loop().time
        link.cut()
        cut_s = clock_s()

        async def fenced() -> bool:
            return not left_by([asked.attempt_id], [])

        await until(fenced, 60)
        assert asked.attempt_id not in onlooker.ended, "called lost before its node had ended it"
        end = await onlooker.end_of(asked.attempt_id, 200)
        assert clock_s() - cut_s >= FENCE_S + LOST_MARGIN_S
        assert end.reason == "lost"

        link.mend()
        await asyncio.to_thread(far.kill)  # Ray ends a raylet that it has called dead, sooner or later
        assert (far.node_dir / "attempts" / asked.attempt_id / "exit.json").exists()
        await asyncio.to_thread(far.start)
        back: Node = await until(far_node, 60)
        assert back.id != node.id
        again = start(back.id, "echo back")
        await neighbours.send(again, again.attempt_id)
        assert (await onlooker.end_of(again.attempt_id)).exit_code == 0
        # What the node says of the first one comes too late, and changes nothing.
        assert onlooker.ended[asked.attempt_id].execution.reason == "lost"
        for each in (asked, again):
            await neighbours.send(LogSealed(job_id=each.job_id), each.job_id)

        async def clean() -> bool:
            return not left_by([asked.attempt_id, again.attempt_id], [far.node_dir])

        await until(clean, 60)
