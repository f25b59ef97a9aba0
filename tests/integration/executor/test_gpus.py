"""GPUs through the whole executor, on Ray: the same promises on a real machine and on one that looks like it.

`pytest -m gpu` runs them on the real one; see tests.support.gpus for the other.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from libs.common.contracts.messages import Container, Execution, Resources, StartExecution
from services.executor.adapters.agent.gpus import GpuMeter, load_nvml
from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.routes import routes
from services.executor.settings import ExecutorSettings
from services.scheduler.domain.machine_types import model_word
from services.scheduler.domain.policy import Demand, Policy
from services.scheduler.domain.shapes import shape_of
from services.scheduler.loops.placer import machines
from services.scheduler.store import Inventory
from tests.integration.executor.attempts import why_no_bwrap
from tests.integration.executor.on_ray import Onlooker, running, start, stdout
from tests.integration.executor.runtimes import podman, why_no_podman
from tests.integration.executor.world import TEAM, Neighbours, ObjectStore, grants, meet_neighbours, until
from tests.support.gpus import GpuMachine, pretended_machine, real_machine, why_no_gpu, why_no_pretence
from tests.support.images import podman_image, unpacked_image, why_no_image
from tests.support.nats import NatsServer, running_nats

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
GIB = 1 << 30
# What a job says of the GPUs that it has: device nodes, and by the variables of programs.
LOOK = "ls /dev | grep -E '^nvidia[0-9]+$' | tr '\\n' ' '; echo \"/ $CUDA_VISIBLE_DEVICES / $NVIDIA_VISIBLE_DEVICES\""
# How many devices CUDA itself opens, by the driver's library alone.
ASK_CUDA = """
import ctypes
cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
print("cuInit", cuda.cuInit(0))
print("cuDeviceGetCount", cuda.cuDeviceGetCount(ctypes.byref(count)), count.value)
"""
real_only = pytest.mark.parametrize("machine", [pytest.param("real", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture(scope="module", params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Iterator[GpuMachine]:
    is_real = request.param == "real"
    if reason := (why_no_gpu() if is_real else why_no_pretence()) or why_no_bwrap():
        pytest.skip(reason)
    with real_machine() if is_real else pretended_machine() as found:
        yield found


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="nabla-home-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def server(machine: GpuMachine, home: Path) -> Iterator[NatsServer]:
    with running_nats(home / "nats", grants()) as running:
        yield running


@pytest.fixture(scope="module")
def objects(machine: GpuMachine) -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.close()


@pytest.fixture
def settings(home: Path, server: NatsServer, machine: GpuMachine, objects: ObjectStore) -> ExecutorSettings:
    return ExecutorSettings(
        home=home,
        nats_url=server.url,
        nats_keys=server.folder / "keys",
        ray_address=machine.head.address,
        front_door=objects.url,
        reconcile_s=1.0,
        look_s=0.5,
        keep_folder_s=0.0,
    )


@pytest.fixture
async def neighbours(server: NatsServer, objects: ObjectStore) -> AsyncIterator[Neighbours]:
    await server.provision(routes())
    met = await meet_neighbours(server, objects)
    yield met
    await met.client.close()


class Bench:
    """An executor that runs, and what its neighbours see of it."""

    def __init__(self, settings: ExecutorSettings, neighbours: Neighbours, onlooker: Onlooker, service) -> None:  # type: ignore[no-untyped-def]
        self.settings = settings
        self.neighbours = neighbours
        self.onlooker = onlooker
        self.service = service
        self.node_id = ""

    async def start(self, command: str, gpus: float, **template: object) -> StartExecution:
        asked = start(self.node_id, command, resources=Resources(cpu_count=0.1, gpu_count=gpus), **template)
        await self.neighbours.send(asked, asked.attempt_id)
        return asked

    async def end(self, asked: StartExecution) -> Execution:
        return await self.onlooker.end_of(asked.attempt_id, 90)

    async def said(self, asked: StartExecution) -> list[str]:
        """What a job printed that ended well."""
        ended, lines = await self.end(asked), await stdout(self.neighbours, asked.job_id)
        assert (ended.reason, ended.exit_code) == ("exited", 0), (ended.detail, lines)
        return lines

    async def hold(self, gpus: float) -> StartExecution:
        """A job that looks around and then waits to be let go; it runs when this returns."""
        wait = f"{LOOK}; touch /storage/$NABLA_JOB_ID.on; until [ -e /storage/$NABLA_JOB_ID.go ]; do sleep 0.05; done"
        asked = await self.start(wait, gpus)
        await self.runs(asked)
        return asked

    async def runs(self, asked: StartExecution) -> None:
        async def on() -> bool:
            return self._note(asked, "on").exists()

        await until(on, 60)

    def let_go(self, *asked: StartExecution) -> None:
        for each in asked:
            self._note(each, "go").touch()

    def shim_pid(self, asked: StartExecution) -> int:
        record = AttemptFolder(self.settings.node_folder / "attempts" / asked.attempt_id).read_shim()
        assert record
        return record.pid

    async def is_short_of_room(self, asked: StartExecution) -> bool:
        async with self.service.store.view() as view:
            rows = await view.of_attempts([asked.attempt_id])
        return any(row.state == "accepted" and "Ray has not reserved" in row.detail for row in rows)

    def _note(self, asked: StartExecution, name: str) -> Path:
        return self.settings.storage_folder / TEAM / f"{asked.job_id}.{name}"


@pytest.fixture
async def bench(settings: ExecutorSettings, neighbours: Neighbours) -> AsyncIterator[Bench]:
    onlooker = Onlooker()
    await onlooker.listen(neighbours)
    async with running(settings) as service:
        made = Bench(settings, neighbours, onlooker, service)
        made.node_id = await onlooker.ready_node()
        yield made


def shown(machine: GpuMachine, indices: Sequence[int]) -> str:
    """What `LOOK` says in a sandbox with these GPUs: CUDA counts them from 0."""
    numbers = ",".join(str(number) for number in range(len(indices)))
    devices = "".join(f"{name} " for name in machine.devices_of(*indices))
    return f"{devices}/ {numbers} / {numbers or 'void'}"


def needs_two(machine: GpuMachine) -> None:
    if machine.count < 2:
        pytest.skip("this machine has one GPU, and this needs two")


async def test_each_job_sees_its_own_gpu_and_a_job_without_sees_none(machine: GpuMachine, bench: Bench) -> None:
    jobs = [await bench.hold(1) for _ in range(min(2, machine.count))]
    without = await bench.said(await bench.start(LOOK, 0))
    bench.let_go(*jobs)
    ends = [await bench.end(each) for each in jobs]
    assert len({end.gpu_indices for end in ends}) == len(jobs)
    assert [(await bench.said(each))[0] for each in jobs] == [shown(machine, end.gpu_indices) for end in ends]
    assert without == [shown(machine, ())]


async def test_two_gpus_are_given_to_one_job(machine: GpuMachine, bench: Bench) -> None:
    needs_two(machine)
    both = await bench.start(LOOK, 2)
    assert await bench.said(both) == [shown(machine, (await bench.end(both)).gpu_indices)]
    assert len((await bench.end(both)).gpu_indices) == 2


async def test_two_jobs_share_a_gpu_and_a_third_waits(machine: GpuMachine, bench: Bench) -> None:
    others = [await bench.hold(1) for _ in range(machine.count - 1)]
    first, second = await bench.hold(0.5), await bench.hold(0.5)
    third = await bench.start(LOOK, 0.5)
    await until(lambda: bench.is_short_of_room(third), 60)
    bench.let_go(first)
    after = await bench.end(third)
    bench.let_go(second, *others)
    ends = [await bench.end(first), await bench.end(second), after]
    assert {end.gpu_indices for end in ends} == {ends[0].gpu_indices}
    assert {(await bench.said(each))[0] for each in (first, second, third)} == {shown(machine, after.gpu_indices)}
    assert (await bench.end(third)).started_at >= ends[0].ended_at


async def test_gpus_are_free_again_after_every_end(machine: GpuMachine, bench: Bench) -> None:
    """Each time all of them: what an end left behind, the next could not have."""
    killed = await bench.hold(machine.count)
    os.kill(bench.shim_pid(killed), signal.SIGKILL)
    assert (await bench.end(killed)).reason != "exited"

    survivor = await bench.hold(machine.count)
    os.kill(machine.head.agent_pid(), signal.SIGKILL)
    waiting = await bench.start(LOOK, machine.count)
    bench.let_go(survivor)
    assert (await bench.end(survivor)).exit_code == 0, "its node agent, a worker of Ray's, was killed and came back"
    assert len((await bench.end(waiting)).gpu_indices) == machine.count

    both_gone = await bench.hold(machine.count)
    os.kill(machine.head.agent_pid(), signal.SIGKILL)
    os.kill(bench.shim_pid(both_gone), signal.SIGKILL)
    assert (await bench.end(both_gone)).reason != "exited"
    at_last = await bench.start(LOOK, machine.count)
    assert await bench.said(at_last) == [shown(machine, range(machine.count))]


async def test_model_and_memory_are_reported_and_chosen_by(machine: GpuMachine, bench: Bench) -> None:
    node = next(node for node in bench.onlooker.nodes if node.id == bench.node_id)
    assert (node.gpu_model, node.gpu_memory_bytes) == (machine.gpus.model, machine.gpus.memory_bytes)
    assert node.gpu_count == machine.count
    sold_gib = round(node.gpu_memory_bytes / GIB)
    policy = Policy()
    policy.apply_nodes(machines([Inventory("executor", (node,), "", 0)]), "")
    wishes = {
        "model": shape_of(0.1, 0, 0.1, model_word(node.gpu_model)),
        "memory": shape_of(0.1, 0, 0.1, "", sold_gib * GIB),
        "other": shape_of(0.1, 0, 0.1, "Voodoo 2"),
        "more": shape_of(0.1, 0, 0.1, "", 2 * sold_gib * GIB),
    }
    for order, (name, shape) in enumerate(wishes.items()):
        policy.apply(Demand(name, "team", (shape,), order))
    assert {placed.job_id for placed in policy.decide(0)} == {"model", "memory"}
    assert policy.why_hopeless("other").endswith(f"no node has such a GPU; the GPUs here are {node.gpu_model}")
    assert "no node has such a GPU" in policy.why_hopeless("more")


async def test_a_container_is_passed_its_own_gpu_by_cdi(machine: GpuMachine, bench: Bench) -> None:
    if reason := why_no_podman():
        pytest.skip(reason)
    with podman_image(podman().command) as image:  # type: ignore[union-attr]
        look = LOOK.replace("tr '\\n' ' '", "while read -r name; do printf '%s ' \"$name\"; done")
        jobs = [await bench.start(look, gpus, container=Container(image=image)) for gpus in (1, 0)]
        said = [await bench.said(each) for each in jobs]
    assert said == [[shown(machine, (await bench.end(each)).gpu_indices)] for each in jobs]


async def test_a_root_without_engine_has_the_driver_from_the_node(
    machine: GpuMachine, settings: ExecutorSettings, neighbours: Neighbours
) -> None:
    if reason := why_no_image():
        pytest.skip(reason)
    plain = settings.model_copy(update={"container_runtime": "bwrap"})
    unpacked_image(settings.node_folder / "images" / "tiny")
    onlooker = Onlooker()
    await onlooker.listen(neighbours)
    async with running(plain) as service:
        bench = Bench(plain, neighbours, onlooker, service)
        bench.node_id = await onlooker.ready_node()
        ask = f"python3 -c '{ASK_CUDA}'" if machine.is_real else 'cat "$LD_LIBRARY_PATH/libcuda.so.1"'
        asked = await bench.start(f"{ask}; {LOOK.split(';')[1]}", 1, container=Container(image="tiny"))
        said = await bench.said(asked)
        without = await bench.start(
            'echo "$LD_LIBRARY_PATH"; ls -d /run/nvidia || true', 0, container=Container(image="tiny")
        )
        assert await bench.said(without) == [""]
    answer = ["cuInit 0", "cuDeviceGetCount 0 1"] if machine.is_real else ["pretended"]
    assert said == [*answer, "/ 0 / 0"]


@real_only
async def test_the_driver_answers_a_job_of_its_own_gpus_alone(machine: GpuMachine, bench: Bench) -> None:
    """Needs nothing but the driver. Of a card that is divided (MIG) this is not tried."""
    listed = await bench.said(await bench.start("nvidia-smi -L", 1))
    assert len([line for line in listed if line.startswith("GPU ")]) == 1, listed
    for count in {1, machine.count}:
        said = await bench.said(await bench.start(f"python3 -c '{ASK_CUDA}'", count))
        assert said == ["cuInit 0", f"cuDeviceGetCount 0 {count}"]


@real_only
def test_use_of_a_real_gpu_is_read(machine: GpuMachine) -> None:
    read = GpuMeter(load_nvml()).read((0,))
    assert set(read) == {"system/gpu_0_percent", "system/gpu_0_memory_bytes", "system/gpu_0_power_watts"}
    assert 0 <= read["system/gpu_0_percent"] <= 100
    assert 0 < read["system/gpu_0_power_watts"] < 2000
