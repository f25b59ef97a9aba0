"""The whole executor on a real Ray head and a real NATS: what Promise 1 to 3 rest on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from libs.common.contracts.messages import (
    Resources,
    StopExecution,
)
from services.executor.adapters.cluster.ray_cluster import RayCluster, connect
from services.executor.app import agent_config
from services.executor.ports import ClusterAway
from services.executor.routes import routes
from services.executor.settings import ExecutorSettings
from tests.integration.executor.on_ray import Onlooker, running, start, stdout
from tests.integration.executor.world import TEAM, Neighbours, ObjectStore, grants, meet_neighbours, until
from tests.support.leftovers import installation_folder
from tests.support.nats import NatsServer, running_nats
from tests.support.ray import RayHead, running_ray
from tests.unit.executor.cluster_suite import ClusterSuite, reservation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def ray_head() -> Iterator[RayHead]:
    with running_ray() as head:
        yield head


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
def settings(home: Path, server: NatsServer, ray_head: RayHead, objects: ObjectStore) -> ExecutorSettings:
    return ExecutorSettings(
        home=home,
        nats_url=server.url,
        nats_keys=server.folder / "keys",
        ray_address=ray_head.address,
        front_door=objects.url,
        reconcile_s=1.0,
        look_s=0.5,
        keep_folder_s=0.0,
    )


@pytest.fixture
async def onlooker(neighbours: Neighbours) -> Onlooker:
    looking = Onlooker()
    await looking.listen(neighbours)
    return looking


async def test_the_executor_answers_before_ray_is_there(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker
) -> None:
    async with running(settings.model_copy(update={"ray_address": ""})) as service:

        async def told() -> bool:
            return onlooker.detail == "the Ray cluster is still starting"

        await until(told, 30)
        assert service.describe() == (True, "the Ray cluster is still starting")


async def test_jobs_run_one_after_the_other(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker
) -> None:
    async with running(settings):
        node_id = await onlooker.ready_node()
        for number in range(4):
            asked = start(node_id, f"echo hello; exit {number}")
            await neighbours.send(asked, asked.attempt_id)
            end = await onlooker.end_of(asked.attempt_id)
            assert (end.reason, end.exit_code, end.state) == ("exited", number, "ended")
            assert await stdout(neighbours, asked.job_id) == ["hello"]


async def test_the_same_command_twice_runs_once(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker
) -> None:
    async with running(settings):
        node_id = await onlooker.ready_node()
        asked, later = start(node_id, "echo x >> /storage/$NABLA_JOB_ID"), start(node_id, "true")
        await neighbours.send(asked, asked.attempt_id)
        await neighbours.send(asked, asked.attempt_id)
        await onlooker.end_of(asked.attempt_id)
        # The commands are delivered in their order: what the third would do is done when a later one has ended.
        await neighbours.send(asked, asked.attempt_id)
        await neighbours.send(later, later.attempt_id)
        await onlooker.end_of(later.attempt_id)
    assert (settings.storage_folder / TEAM / asked.job_id).read_text() == "x\n"


async def test_gpus_of_a_job_are_its_own_and_are_recorded(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker
) -> None:
    async with running(settings):
        node_id = await onlooker.ready_node()
        both = [
            start(node_id, "echo gpu $CUDA_VISIBLE_DEVICES; sleep 1", resources=Resources(gpu_count=1))
            for _ in range(2)
        ]
        for asked in both:
            await neighbours.send(asked, asked.attempt_id)
        ends = [await onlooker.end_of(asked.attempt_id, 60) for asked in both]
        shown = [(await stdout(neighbours, asked.job_id))[0] for asked in both]
    assert sorted(end.gpu_indices for end in ends) == [(0,), (1,)]
    assert shown == [f"gpu {end.gpu_indices[0]}" for end in ends]


async def test_shares_of_a_gpu_are_on_one_gpu_and_leave_the_other_whole(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker
) -> None:
    """As the scheduler's policy takes it to be."""
    async with running(settings):
        node_id = await onlooker.ready_node()
        wishes = (0.5, 0.5, 1)
        asked = [start(node_id, "sleep 3", resources=Resources(gpu_count=wish)) for wish in wishes]
        for each in asked:
            await neighbours.send(each, each.attempt_id)
        ends = [await onlooker.end_of(each.attempt_id, 60) for each in asked]
    assert [end.reason for end in ends] == ["exited"] * 3
    first, second, whole = (end.gpu_indices for end in ends)
    assert first == second
    assert set(first) | set(whole) == {0, 1}


async def test_a_job_is_stopped_and_one_without_memory_is_killed(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker
) -> None:
    async with running(settings):
        node_id = await onlooker.ready_node()
        hungry = start(
            node_id,
            "python -c 'import time; x = bytearray(300_000_000); time.sleep(30)'",
            resources=Resources(memory_bytes=80_000_000),
        )
        patient = start(node_id, "echo up; sleep 60")
        for asked in (hungry, patient):
            await neighbours.send(asked, asked.attempt_id)
        await until(lambda: stdout(neighbours, patient.job_id))
        await neighbours.send(StopExecution(attempt_id=patient.attempt_id, reason="cancelled"), patient.attempt_id)
        end = await onlooker.end_of(patient.attempt_id)
        assert (end.reason, end.detail) == ("stopped", "cancelled")
        assert (await onlooker.end_of(hungry.attempt_id)).reason == "out_of_memory"


async def test_a_job_outlives_its_agent_and_the_executor(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker, ray_head: RayHead
) -> None:
    async with running(settings):
        asked = start(await onlooker.ready_node(), "for i in $(seq 80); do echo line $i; sleep 0.05; done; exit 7")
        await neighbours.send(asked, asked.attempt_id)
        await until(lambda: stdout(neighbours, asked.job_id))
    os.kill(ray_head.agent_pid(), signal.SIGKILL)
    async with running(settings):
        end = await onlooker.end_of(asked.attempt_id, 40)
    assert (end.reason, end.exit_code) == ("exited", 7)
    assert await stdout(neighbours, asked.job_id) == [f"line {number}" for number in range(1, 81)]


async def test_nothing_stays_reserved_when_all_has_ended(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker
) -> None:
    # One that was stopped right after an end has left its reservation to the next. A process has one connection to
    # Ray, so it looks only afterwards.
    async with running(settings) as service:

        async def done() -> bool:
            async with service.store.view() as view:
                return not await view.due() and not await view.unfinished()

        await onlooker.ready_node()
        await until(done, 30)
    cluster = connect(settings.find_ray_address, agent_config(settings), settings.ray_namespace)

    async def nothing() -> bool:
        return not await cluster.reserved()

    await until(nothing, 30)
    await cluster.close()


class TestRayCluster(ClusterSuite):
    """Ray keeps the same promises as the fake of the unit tests."""

    @pytest.fixture
    async def cluster(self, settings: ExecutorSettings, neighbours: Neighbours) -> AsyncIterator[RayCluster]:
        made = connect(settings.find_ray_address, agent_config(settings), settings.ray_namespace)
        yield made
        await made.close()

    @pytest.fixture
    async def node_id(self, cluster: RayCluster) -> str:
        async def find() -> str:
            return next((node.id for node in await cluster.look({}) if node.agent), "")

        found: str = await until(find, 40)
        return found

    async def test_an_agent_of_another_configuration_is_replaced(
        self, cluster: RayCluster, node_id: str, settings: ExecutorSettings, ray_head: RayHead
    ) -> None:
        before = ray_head.agent_pid()
        other = settings.model_copy(update={"node_fence_s": 60.0})
        newer = connect(settings.find_ray_address, agent_config(other), other.ray_namespace)

        async def answers() -> bool:
            return any(node.agent for node in await newer.look({}))

        await until(answers, 40)
        assert ray_head.agent_pid() != before
        await newer.close()

    async def test_installations_in_namespaces_of_their_own_leave_each_other_alone(
        self, cluster: RayCluster, node_id: str, settings: ExecutorSettings, ray_head: RayHead, tmp_path: Path
    ) -> None:
        before = ray_head.agents()
        theirs = settings.model_copy(update={"home": tmp_path, "ray_namespace": "theirs"})
        beside = connect(theirs.find_ray_address, agent_config(theirs), theirs.ray_namespace)

        async def answers() -> bool:
            return any(node.agent for node in await beside.look({}))

        await until(answers, 40)
        await beside.close()
        assert set(ray_head.agents()) > set(before)
        command = [sys.executable, "-m", "services.executor.adapters.cluster.ray_departure", ray_head.address, "theirs"]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
        said, _ = await process.communicate()
        assert said == b"1 agents and 0 reservations were taken off\n"

        async def left_alone() -> bool:
            return ray_head.agents() == before

        await until(left_alone, 40)

    async def test_it_can_be_closed_while_calls_are_under_way(
        self, settings: ExecutorSettings, ray_head: RayHead
    ) -> None:
        config = json.dumps(asdict(agent_config(settings)))
        command = [sys.executable, "-m", "tests.integration.executor.closing", ray_head.address, config]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
        _, said = await process.communicate()
        assert process.returncode == 0, said.decode()[-2000:]


@pytest.mark.full
async def test_a_job_outlives_ray_itself(
    settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker, ray_head: RayHead
) -> None:
    async with running(settings) as service:
        first = await onlooker.ready_node()
        asked = start(first, "for i in $(seq 150); do echo line $i; sleep 0.1; done")
        await neighbours.send(asked, asked.attempt_id)
        await until(lambda: stdout(neighbours, asked.job_id))
        await asyncio.to_thread(ray_head.stop)

        async def told() -> bool:
            return "does not answer" in service.describe()[1]

        await until(told, 40)
        await asyncio.to_thread(ray_head.start)
        end = await onlooker.end_of(asked.attempt_id, 60)
    assert (end.reason, end.exit_code) == ("exited", 0)
    assert end.node_id != first
    assert await stdout(neighbours, asked.job_id) == [f"line {number}" for number in range(1, 151)]


@pytest.mark.full
async def test_the_first_call_after_the_death_of_the_head_says_so(
    settings: ExecutorSettings, neighbours: Neighbours, ray_head: RayHead
) -> None:
    """The last test here, as it leaves no head behind."""
    cluster = connect(settings.find_ray_address, agent_config(settings), settings.ray_namespace)
    try:
        await cluster.look({})
        pid = ray_head.gcs_pid()
        (node,) = await cluster.look({})
        os.kill(pid, signal.SIGKILL)
        while ray_head.answers():
            await asyncio.sleep(0.01)
        with pytest.raises(ClusterAway, match="does not answer"):
            await cluster.reserve(reservation(node.id))
    finally:
        await cluster.close()
