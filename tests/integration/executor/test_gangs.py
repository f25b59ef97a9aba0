"""Gangs of every type in real sandboxes of one node: their ranks find each other, and nobody else is obeyed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from libs.common.contracts.gangs import rank_template, ranks_of
from libs.common.contracts.messages import Container, Environment, Gang, JobTemplate, Resources, Role
from libs.common.ids import new_id
from services.executor.adapters.agent.node_agent import NodeAgent, stop_all
from services.executor.adapters.runtimes.engine import Engine
from services.executor.domain.gang import BLOCKS, FIRST_PORT, PORT_COUNT, GangFacts, gang_order
from services.executor.ports import AgentConfig, StartOrder
from tests.integration.executor.runtimes import podman, why_no_podman
from tests.integration.executor.test_node_agent import NODE, ROOT, config, running
from tests.integration.executor.world import PROJECT, TEAM, Neighbours, reports, until
from tests.support.images import podman_image

__all__ = ["config"]
pytestmark = pytest.mark.integration
ISOLATIONS = ("bwrap", "process")

MEET = """
import json, os, socket
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if rank == 0:
    server = socket.create_server(where)
    print("sum", sum(int(server.accept()[0].recv(9)) for _ in range(size - 1)), flush=True)
else:
    while True:
        try:
            socket.create_connection(where).send(str(rank).encode())
            break
        except OSError:
            pass
open(os.path.join(os.environ["NABLA_ARTIFACTS"], "mine"), "w").write(str(rank))
print("rank", rank, "done", flush=True)
"""


@pytest.fixture(params=ISOLATIONS)
async def agent(request: pytest.FixtureRequest, config: AgentConfig) -> AsyncIterator[NodeAgent]:
    async with running(replace(config, isolation=request.param)) as made:
        if request.param == "bwrap" and (await made.look({})).isolation != "bwrap":
            pytest.skip("no sandboxes here: install bubblewrap")
        yield made
    stop_all(Path(config.node_dir), 0.0, "the test is over")


def free_ports() -> int:
    """The first of a gang's ports of which nobody on this machine has those that its ranks will want."""
    for first in range(FIRST_PORT, FIRST_PORT + BLOCKS * PORT_COUNT, PORT_COUNT):
        with contextlib.ExitStack() as sockets, contextlib.suppress(OSError):
            for port in range(first, first + 4):
                sockets.enter_context(socket.create_server(("", port)))
            return first
    raise OSError("this machine has no ports for a gang")


def orders(kind: str, roles: tuple[Role, ...], command: tuple[str, ...], **fields: object) -> list[StartOrder]:
    """What the executor would tell the one node of a gang."""
    template = JobTemplate(command=command, gang=Gang(type=kind, roles=roles), **fields)
    ranks = ranks_of(template)
    facts = GangFacts((NODE,) * len(ranks), free_ports(), new_id("attempt") * 2)
    attempt_id, job_id = new_id("attempt"), new_id("job")
    return [
        StartOrder(
            attempt_id=attempt_id,
            job_id=job_id,
            number=1,
            team_id=TEAM,
            project_id=PROJECT,
            experiment_id="",
            template=rank_template(template, rank),
            token="nbla_secret",
            team_uid=61001,
            gang=gang_order(kind, facts, ranks, rank.number, {}),
        )
        for rank in ranks
    ]


async def ends(neighbours: Neighbours, told: list[StartOrder], ranks: set[int], limit_s: float = 60) -> dict[int, int]:
    """The exit codes of these ranks, once all have ended."""

    async def ended() -> dict[int, int]:
        found = {}
        for report in await reports(neighbours):
            seen = report.execution
            if seen.attempt_id == told[0].attempt_id and seen.state == "ended":
                found[seen.rank] = -1 if seen.exit_code is None else seen.exit_code
        return found if ranks <= set(found) else {}

    return dict(await until(ended, limit_s))


async def lines(neighbours: Neighbours, told: list[StartOrder]) -> list[tuple[int, str]]:
    said = [(order.rank, line) for order in told for line in await neighbours.log(order.job_id, order.rank)]
    return [(rank, line.text) for rank, line in said if line.stream != "nabla"]


async def test_ranks_on_one_node_meet_and_log_and_keep_as_themselves(agent: NodeAgent, neighbours: Neighbours) -> None:
    told = orders("torch", (Role(name="worker", count=3),), ("python", "-c", MEET))
    for order in told:
        await agent.start(order)
    assert await ends(neighbours, told, {0, 1, 2}) == {0: 0, 1: 0, 2: 0}
    said = await lines(neighbours, told)
    assert (0, "sum 3") in said
    assert {(rank, f"rank {rank} done") for rank in range(3)} <= set(said)
    frames = await neighbours.frames(told[0].job_id)
    assert {frame.rank for frame in frames if frame.last} == {0, 1, 2}


@pytest.mark.skipif(bool(why_no_podman()), reason=why_no_podman() or "there is one")
@pytest.mark.timeout(240)  # it makes two images
async def test_a_rank_in_a_container_meets_one_in_a_sandbox_and_one_of_another_image(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    engine = podman()
    assert isinstance(engine, Engine)
    with podman_image(engine.command) as one, podman_image(engine.command) as other:
        roles = (
            Role(name="master", count=1, container=Container(image=one)),
            Role(name="worker", count=1),
            Role(name="ps", count=1, container=Container(image=other)),
        )
        where = "test -e /etc/made-for-tests && echo in an image || echo in a sandbox; "
        told = orders("torch", roles, ("sh", "-c", f'{where} exec python3 -c "$0"', MEET))
        async with running(replace(config, isolation="bwrap")) as agent:
            if (await agent.look({})).isolation != "bwrap":
                pytest.skip("no sandboxes here: install bubblewrap")
            for order in told:
                await agent.start(order)
            ended = await ends(neighbours, told, {0, 1, 2}, 100)
        said = await lines(neighbours, told)
    assert ended == {0: 0, 1: 0, 2: 0}, said
    assert (0, "sum 3") in said
    walls = {(0, "in an image"), (1, "in a sandbox"), (2, "in an image")}
    assert walls == {pair for pair in said if pair[1].startswith("in a")}


async def test_the_order_of_a_rank_outlives_its_agent(config: AgentConfig, neighbours: Neighbours) -> None:
    told = orders("torch", (Role(name="worker", count=2),), ("sleep 0.5; echo $NABLA_RANK of $NABLA_WORLD_SIZE",))
    async with running(config) as first:
        for order in told:
            await first.start(order)
    async with running(config) as second:
        assert {order.execution_id for order in told} <= (await second.look({})).held
        assert await ends(neighbours, told, {0, 1}) == {0: 0, 1: 0}
        assert sorted(await lines(neighbours, told)) == [(0, "0 of 2"), (1, "1 of 2")]
        for order in told:
            await second.drop(order.execution_id)
        assert (await second.look({})).held == frozenset()


async def test_a_rank_runs_what_another_asks_for_as_ssh_would(agent: NodeAgent, neighbours: Neighbours) -> None:
    roles = (Role(name="master", count=1), Role(name="worker", count=1))
    ask = (
        'host=$(sed -n "2s/ .*//p" $OMPI_MCA_orte_default_hostfile); '
        'echo over | $OMPI_MCA_plm_rsh_agent -x $host "read word; echo \\$word to rank \\$NABLA_RANK; exit 7"; '
        "echo code $?; NABLA_GANG_KEY=wrong $OMPI_MCA_plm_rsh_agent $host echo never; echo code $?"
    )
    told = orders("mpi", roles, (ask,))
    for order in told:
        await agent.start(order)
    assert await ends(neighbours, told, {0}) == {0: 0}
    said = [text for _, text in await lines(neighbours, told)]
    assert [text for text in said if not text.startswith("nabla-rsh")] == ["over to rank 1", "code 7", "code 255"]
    assert await agent.stop(told[1].execution_id, 0.0, "its work is done")
    await ends(neighbours, told, {0, 1})


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no MPI here: apt-get install openmpi-bin, or mpich")
async def test_mpirun_starts_a_process_on_every_rank(agent: NodeAgent, neighbours: Neighbours) -> None:
    roles = (Role(name="master", count=1), Role(name="worker", count=2))
    command = ("mpirun", "-n", "3", "/bin/sh", "-c", "echo started by $NABLA_RANK")
    told = orders("mpi", roles, command)
    for order in told:
        await agent.start(order)
    assert await ends(neighbours, told, {0}, 120.0) == {0: 0}
    said = [text for _, text in await lines(neighbours, told)]
    assert sorted(text for text in said if text.startswith("started")) == [f"started by {rank}" for rank in range(3)]
    for order in told[1:]:
        await agent.stop(order.execution_id, 0.0, "its work is done")
    await ends(neighbours, told, {0, 1, 2})


def torch_prefix() -> str:
    """An environment with torch: the one named by NABLA_TEST_TORCH, or nothing."""
    prefix = os.environ.get("NABLA_TEST_TORCH", "")
    return prefix if prefix and list(Path(prefix).glob("lib/python3*/site-packages/torch/__init__.py")) else ""


NO_TORCH = (
    "no PyTorch at hand: `python -m venv /tmp/torch && /tmp/torch/bin/pip install torch`, a CPU build, and "
    "NABLA_TEST_TORCH=/tmp/torch"
)


@pytest.mark.full
@pytest.mark.skipif(not torch_prefix(), reason=NO_TORCH)
async def test_two_ranks_of_the_example_learn_what_one_does(config: AgentConfig, neighbours: Neighbours) -> None:
    workspace = neighbours.put_workspace({"train.py": (ROOT / "examples" / "ddp" / "train.py").read_bytes()})
    own = Environment(kind="venv", path=str(Path(torch_prefix()).resolve()))
    losses = []
    async with running(config) as agent:
        for size in (1, 2):
            told = orders(
                "torch",
                (Role(name="worker", count=size),),
                ("python", "train.py"),
                environment=own,
                workspace_id=workspace,
            )
            for order in told:
                await agent.start(order)
            ended = await ends(neighbours, told, set(range(size)), 120.0)
            assert set(ended.values()) == {0}, await lines(neighbours, told)
            result = json.loads(neighbours.sealed("artifacts", told[0].job_id)["result.json"])
            assert result["ranks"] == size
            losses.append(result["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] < 0.5


USE_RAY = """
import os, ray, time
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
while len([node for node in ray.nodes() if node["Alive"]]) < 2:
    time.sleep(0.1)
print("nodes", len(ray.nodes()), "cpus", int(ray.cluster_resources()["CPU"]), flush=True)
"""


@pytest.mark.full
async def test_a_private_ray_cluster_lives_in_the_gang_alone(config: AgentConfig, neighbours: Neighbours) -> None:
    roles = (Role(name="head", count=1), Role(name="worker", count=1))
    own = Environment(kind="venv", path=str(Path(ROOT, ".venv").resolve()))
    told = orders("ray", roles, ("python", "-c", USE_RAY), environment=own, resources=Resources(cpu_count=2))
    async with running(config) as agent:
        for order in told:
            await agent.start(order)
        assert (await ends(neighbours, told, {0}, 180.0))[0] == 0
        assert (0, "nodes 2 cpus 4") in await lines(neighbours, told)
        await agent.stop(told[1].execution_id, 0.0, "its work is done")
        await ends(neighbours, told, {0, 1})
