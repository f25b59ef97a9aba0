"""Secrets on a node: a real agent, a real NATS, real sandboxes, and a registry that answers as ours does."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from libs.common.contracts.messages import Container, JobTemplate, Source
from services.executor.adapters.agent.agent_bus import AgentBus
from services.executor.adapters.agent.secrets import Secrets
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec, Image
from services.executor.adapters.runtimes import hold
from services.executor.adapters.runtimes.engine import Engine
from services.executor.adapters.runtimes.podman import Podman
from services.executor.adapters.runtimes.runtime import LaunchRefused
from services.executor.ports import AgentConfig
from tests.integration.executor.attempts import eventually, running_node, said
from tests.integration.executor.runtimes import Kit, podman, podman_kit, why_no_podman
from tests.integration.executor.test_node_agent import config, ended, order, running, texts
from tests.integration.executor.world import Neighbours, until
from tests.support.nats import NatsServer

__all__ = ["config"]  # the fixture

pytestmark = pytest.mark.integration
VALUE = "correct horse battery staple"


def on_disk(folder: Path, *forms: str) -> list[Path]:
    """Files with one of these texts in them."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [path for form in forms if form.encode() in content]
    return found


async def until_shown(neighbours: Neighbours, job_id: str, text: str) -> None:
    async def look() -> bool:
        return any(text in line.text for line in await neighbours.log(job_id))

    await until(look)


async def test_a_job_gets_its_secrets_and_neither_node_nor_bus_keeps_them(
    config: AgentConfig, neighbours: Neighbours, nats_server: NatsServer
) -> None:
    neighbours.secrets = {f"S{number}": f"{VALUE} {number}" for number in range(11)} | {"UNNAMED": VALUE}
    env = {f"V{number}": f"secret:S{number}" for number in range(11)} | {"PLAIN": "secret::S1"}
    async with running(config) as agent:
        asked = order("echo $V3 $V10; echo ${#V3}; echo $PLAIN; echo $V4 >&2; echo up; sleep 60", env=env)
        await agent.start(asked)
        await until_shown(neighbours, asked.job_id, "up")
        assert on_disk(Path(config.node_dir), VALUE) == []
        await agent.stop(asked.attempt_id, 0.0, "seen enough")
        await ended(agent, asked.attempt_id)
    assert await texts(neighbours, asked) == ["*** ***", str(len(VALUE) + 2), "secret:S1", "up"]
    assert await texts(neighbours, asked, "stderr") == ["***"]
    assert neighbours.asked.count("RevealSecrets") == 2, "eight names a question"
    assert on_disk(nats_server.folder, VALUE, base64.b64encode(VALUE.encode()).decode()[:32]) == []


async def test_a_job_whose_secret_is_not_there_ends_at_once_and_says_what_to_do(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    async with running(config) as agent:
        asked = order("echo ran", env={"A": "secret:GONE"})
        await agent.start(asked)
        end = await ended(agent, asked.attempt_id)
    told = "There is no secret GONE in this project or team. `nabla secrets set GONE` makes it."
    assert (end.reason, end.detail) == ("refused", told)
    assert told in await texts(neighbours, asked, "nabla")
    assert await texts(neighbours, asked) == []


async def test_who_begins_again_before_the_start_asks_again(config: AgentConfig, neighbours: Neighbours) -> None:
    neighbours.secrets, neighbours.silent_about_secrets = {"A": VALUE}, True
    asked = order('echo "got ${#A}"', env={"A": "secret:A"})
    async with running(config) as agent:
        await agent.start(asked)
        await until(lambda: as_awaitable(neighbours.asked.count("RevealSecrets") > 1))
    neighbours.silent_about_secrets = False
    async with running(config) as agent:
        await ended(agent, asked.attempt_id)
    assert await texts(neighbours, asked) == [f"got {len(VALUE)}"]


async def as_awaitable(value: bool) -> bool:
    return value


async def test_the_log_stays_masked_when_the_agent_begins_again_and_the_secret_is_gone(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    neighbours.secrets = {"A": VALUE}
    go = Path(config.node_dir) / "attempts"
    asked = order("echo up; while [ ! -e go ]; do sleep 0.05; done; echo $A", env={"A": "secret:A"})
    async with running(config) as agent:
        await agent.start(asked)
        await until_shown(neighbours, asked.job_id, "up")
    neighbours.secrets = {}
    (go / asked.attempt_id / "workspace" / "go").touch()
    async with running(config) as agent:
        await ended(agent, asked.attempt_id)
    assert await texts(neighbours, asked) == ["up", "***"]
    assert neighbours.asked.count("RevealSecrets") == 1


async def test_a_stop_is_heard_while_the_registry_is_silent(config: AgentConfig, neighbours: Neighbours) -> None:
    neighbours.silent_about_secrets = True
    async with running(config) as agent:
        asked = order("echo ran", env={"A": "secret:A"})
        await agent.start(asked)
        await until(lambda: as_awaitable("RevealSecrets" in neighbours.asked))
        await agent.stop(asked.attempt_id, 0.0, "changed my mind")
        end = await ended(agent, asked.attempt_id)
    assert (end.reason, end.detail) == ("stopped", "changed my mind")


@pytest.fixture
async def secrets(nats_server: NatsServer, neighbours: Neighbours) -> AsyncIterator[Secrets]:
    bus = AgentBus(nats_server.url, nats_server.seed("agent"))
    yield Secrets(bus)
    await bus.close()


async def test_credentials_are_resolved_in_memory(secrets: Secrets, neighbours: Neighbours) -> None:
    neighbours.secrets = {"REGISTRY": VALUE, "GIT": "token-of-git", "A": "value of A"}
    template = JobTemplate(
        env={"A": "secret:A"},
        container=Container(image="i", registry_username="me", registry_password="secret:REGISTRY"),
        source=Source(kind="git", password="secret:GIT"),
    )
    asked = replace(order("true"), template=template)
    revealed = await secrets.reveal(asked)
    assert revealed.template.container.registry_password == VALUE
    assert (revealed.template.container.registry_username, revealed.template.source.password) == ("me", "token-of-git")
    assert revealed.template.env == {"A": "secret:A"}, "what a spec is made of names the secret"
    assert VALUE not in repr(revealed)
    said = revealed.masker().text(f"git: cannot reach https://me:token-of-git@host, {VALUE}")
    assert said == "git: cannot reach https://me:***@host, ***"


async def test_an_order_without_secrets_asks_nobody(secrets: Secrets, neighbours: Neighbours) -> None:
    revealed = await secrets.reveal(order("true"))
    assert (revealed.values, revealed.for_shim()) == ({}, b"")
    assert neighbours.asked == []


@contextlib.contextmanager
def container_without_a_shell() -> Iterator[Kit]:
    if why_no_podman():
        pytest.skip(why_no_podman())
    with podman_kit(has_shell=False) as kit:
        yield kit


def engine_folders() -> list[Path]:
    """Where podman and its OCI runtime keep what they know of containers."""
    engine = podman()
    assert isinstance(engine, Engine)
    form = "{{.Store.GraphRoot}}/overlay-containers {{.Store.RunRoot}} {{.Store.GraphRoot}}/libpod"
    words = [*engine.command, "info", "--format", form]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    return [Path(folder) for folder in (*said, "/run/runc", "/run/crun", "/run/libpod", "/dev/shm")]


def test_an_image_without_a_shell_gets_its_secrets_and_no_disk_does() -> None:
    words = ["python3", "-c", "import os, time; print(len(os.environ['A']), flush=True); time.sleep(1000)"]
    with running_node() as node, container_without_a_shell() as kit:
        folder = node.start(words, secrets=json.dumps({"S": VALUE}).encode(), secret_env={"A": "S"}, **kit.fields)
        eventually(lambda: said(folder, str(len(VALUE))), "the length of the secret")
        assert [found for place in (node.path, *engine_folders()) for found in on_disk(place, VALUE)] == []
        assert on_disk(node.path, "secret_env") != [], "the search finds what is no secret"
        assert any(on_disk(place, folder.path.name) for place in engine_folders()), "and what podman knows"
        folder.request_stop(0, "seen enough")
        node.end_of(folder)
        assert not list(Path("/dev/shm").glob(f"*{folder.path.name}*"))


def test_where_no_memory_takes_them_secrets_without_a_shell_are_refused(tmp_path: Path) -> None:
    folder = AttemptFolder(tmp_path / "attempts" / "a1")
    image = Image(image="i", name="distroless", engine=["/usr/bin/podman", "--runtime=/usr/bin/runc"], has_shell=False)
    spec = AttemptSpec(
        attempt_id="a1", job_id="j1", command=["true"], isolation="podman", image=image, secret_env={"A": "S"}
    )
    with pytest.raises(LaunchRefused, match=r"distroless has no shell .*/usr is not in memory.* take an image with"):
        Podman(memory=Path("/usr")).start(spec, folder, None, None)
    assert not folder.path.exists()


def test_a_folder_that_is_not_there_yet_is_in_memory_when_the_next_above_it_is() -> None:
    assert hold.is_memory(Path("/dev/shm/not/there/yet"))
    assert not hold.is_memory(Path("/usr/not/there"))
