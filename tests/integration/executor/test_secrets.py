"""Secrets on a node: a real agent, a real NATS, real sandboxes, and a registry that answers as ours does."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from libs.common.contracts.messages import Container, JobTemplate, Source
from services.executor.adapters.agent.agent_bus import AgentBus
from services.executor.adapters.agent.secrets import Secrets
from services.executor.ports import AgentConfig
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
