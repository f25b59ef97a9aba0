"""The node agent with images: from an order to a reported end, and what is left when all around a container died."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from libs.common.contracts.messages import Container, Environment
from services.executor.adapters.attempts import processes
from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.adapters.runtimes.engine import Engine
from services.executor.ports import AgentConfig
from tests.integration.executor.attempts import processes_of
from tests.integration.executor.runtimes import podman, why_no_podman
from tests.integration.executor.test_node_agent import config, ended, order, running, texts
from tests.integration.executor.test_runtimes import containers_of, residue
from tests.integration.executor.world import Neighbours, until
from tests.support.images import podman_image

__all__ = ["config"]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(why_no_podman()), reason=why_no_podman() or "there is one"),
]


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    engine = podman()
    assert isinstance(engine, Engine)
    with podman_image(engine.command) as name:
        yield name


def folder_of(config: AgentConfig, attempt_id: str) -> AttemptFolder:
    return AttemptFolder(Path(config.node_dir) / "attempts" / attempt_id)


async def test_a_job_runs_in_its_image_with_its_workspace_and_the_sdk(
    config: AgentConfig, neighbours: Neighbours, image: str
) -> None:
    fileset = neighbours.put_workspace({"train.py": b"import nabla.job, os; print(os.getcwd()); open('made', 'w')"})
    asked = order(
        "python3 train.py && cat /etc/made-for-tests && cp made /artifacts && touch /storage/kept",
        workspace_id=fileset,
        container=Container(image=image),
        env={"PYTHONPATH": "/mine"},
    )
    async with running(config) as agent:
        await agent.start(asked)
        end = await ended(agent, asked.attempt_id)
        runtimes = (await agent.look({})).runtimes
    lines = await neighbours.log(asked.job_id)
    assert (end.reason, end.exit_code, end.isolation) == ("exited", 0, "podman"), [line.text for line in lines]
    assert f"isolation: podman, image: {image}, network: " in lines[0].text
    assert [line.text for line in lines if line.stream == "stdout"] == ["/workspace"]
    assert neighbours.sealed("artifacts", asked.job_id) == {"made": b""}
    storage = Path(config.storage_root) / asked.team_id / "kept"
    assert storage.stat().st_uid == (asked.team_uid if os.geteuid() == 0 else os.geteuid())
    assert runtimes == ("podman",)
    assert residue(folder_of(config, asked.attempt_id)) == []


@pytest.mark.parametrize(
    ("container", "why"),
    [
        (Container(image="localhost/not/there:1"), "there is no image localhost/not/there:1 on this node"),
        (Container(image="IMAGE", user="nobody-here"), "the image has no user 'nobody-here'"),
    ],
)
async def test_an_image_that_cannot_be_had_ends_the_attempt_with_the_reason(
    config: AgentConfig, neighbours: Neighbours, image: str, container: Container, why: str
) -> None:
    asked = order("true", container=container.model_copy(update={"image": container.image.replace("IMAGE", image)}))
    async with running(config) as agent:
        await agent.start(asked)
        end = await ended(agent, asked.attempt_id)
    assert (end.reason, end.exit_code) == ("refused", None)
    assert why in end.detail
    assert any(why in line.text for line in await neighbours.log(asked.job_id))


async def test_a_command_that_the_image_has_not_is_named(
    config: AgentConfig, neighbours: Neighbours, image: str
) -> None:
    asked = order("no-such-command", "x", container=Container(image=image))
    async with running(config) as agent:
        await agent.start(asked)
        end = await ended(agent, asked.attempt_id)
    assert (end.reason, end.exit_code, end.detail) == ("exited", 127, "command not found: no-such-command")


async def test_an_agent_that_comes_back_finds_its_containers_running(
    config: AgentConfig, neighbours: Neighbours, image: str
) -> None:
    asked = order("echo begun; while [ ! -e go ]; do sleep 0.05; done; echo done", container=Container(image=image))
    folder = folder_of(config, asked.attempt_id)
    async with running(config) as agent:
        await agent.start(asked)
        await until(lambda: asyncio.to_thread(folder.read_started))
    async with running(config) as agent:
        await until(lambda: asyncio.to_thread(containers_of, folder))
        (folder.workspace / "go").touch()
        end = await ended(agent, asked.attempt_id)
    assert (end.exit_code, await texts(neighbours, asked)) == (0, ["begun", "done"])


@pytest.mark.parametrize("agent_is_there", [True, False])
async def test_a_container_whose_watchers_were_all_killed_is_removed(
    config: AgentConfig, neighbours: Neighbours, image: str, agent_is_there: bool
) -> None:
    asked = order("(setsid sleep 1000 &); sleep 1000", container=Container(image=image))
    folder = folder_of(config, asked.attempt_id)
    async with running(config) as agent:
        await agent.start(asked)
        await until(lambda: asyncio.to_thread(folder.read_started))
        if agent_is_there:
            kill_watchers(folder)
            end = await ended(agent, asked.attempt_id)
    if not agent_is_there:
        kill_watchers(folder)
        async with running(config) as agent:
            end = await ended(agent, asked.attempt_id)
    assert end.reason == "lost"
    await until(lambda: asyncio.to_thread(lambda: not (processes_of(folder) or containers_of(folder))))
    await until(lambda: asyncio.to_thread(lambda: not residue(folder)))


async def test_a_container_of_an_attempt_that_nobody_knows_is_removed(
    config: AgentConfig, neighbours: Neighbours, image: str
) -> None:
    engine = podman()
    assert isinstance(engine, Engine)
    Path(config.node_dir).mkdir(parents=True)
    name = f"nabla-unknown-{os.getpid()}"
    labels = ["--label=nabla.attempt=unknown", f"--label=nabla.node={config.node_dir}"]
    limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]
    words = [*engine.command, "run", "--detach", f"--name={name}", "--network=none", *limits, *labels, image]
    await asyncio.to_thread(subprocess.run, [*words, "sleep", "1000"], check=True, capture_output=True)
    other = replace(config, node_dir=f"{config.node_dir}-other")
    gone = AttemptFolder(Path(name.removeprefix("nabla-")))
    async with running(other) as agent:  # two installations on one machine leave each other's alone
        await until(lambda: runtimes_of(agent))
        assert containers_of(gone) == [name]
    async with running(config):
        await until(lambda: asyncio.to_thread(lambda: not containers_of(gone)))


async def runtimes_of(agent: object) -> tuple[str, ...]:
    view = await agent.look({})  # type: ignore[attr-defined]
    return tuple(view.runtimes)


async def test_an_environment_of_the_node_s_is_not_for_an_image(
    config: AgentConfig, neighbours: Neighbours, image: str
) -> None:
    asked = order("echo $VIRTUAL_ENV; which python3", container=Container(image=image), environment=Environment())
    async with running(config) as agent:
        await agent.start(asked)
        await ended(agent, asked.attempt_id)
    assert [text for text in await texts(neighbours, asked) if text] == []


def kill_watchers(folder: AttemptFolder) -> None:
    record = folder.read_shim()
    assert record
    guardian = processes.descendants(record.pid)[0]
    for pid in (guardian, record.pid):
        os.kill(pid, signal.SIGKILL)
