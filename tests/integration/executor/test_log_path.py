"""The way of a log from the process to the bus: what is shown live, and who waits when nobody takes it."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import nats
import pytest
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from infra.local.nats import PROVISIONER
from libs.common.contracts.messages import LogFrame, LogPage
from libs.common.contracts.subjects import LOGS, tail_subject
from libs.common.loglines import Slice
from services.executor.ports import AgentConfig
from tests.integration.executor.test_node_agent import ROOT, ended, file_in, order, running, texts
from tests.integration.executor.world import TEAM, Neighbours, until
from tests.support.nats import NatsServer

pytestmark = pytest.mark.integration
PROGRESS = (
    "for n in 10 20 30; do printf '\\rloading %s%%' $n; while [ ! -e go$n ]; do sleep 0.02; done; done; "
    "printf '\\rloaded\\n'"
)
# What no compression makes small.
NOISE = "import random\nr = random.Random(1)\nfor n in range(6000): print(n, r.randbytes(200).hex())\n"


@pytest.fixture
def config(node_dir: Path, nats_server: NatsServer, neighbours: Neighbours) -> AgentConfig:
    return AgentConfig(
        node_dir=str(node_dir / "node"),
        default_environment=str(ROOT / ".venv-serving"),
        client_folder=str(ROOT / "libs" / "client"),
        storage_root=str(node_dir / "storage"),
        front_door=neighbours.objects.url,
        nats_url=nats_server.url,
        nats_seed=nats_server.seed("agent"),
    )


async def test_a_progress_bar_moves_live_and_its_last_state_is_kept(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    asked = order(PROGRESS)
    shown: list[str] = []

    async def hear(message: Msg) -> None:
        shown.extend(line.text for line in LogPage.from_wire(message.data).unfinished)

    async def shows(text: str) -> bool:
        return text in shown

    await neighbours.client.subscribe(tail_subject(TEAM, asked.job_id), cb=hear)
    async with running(config) as agent:
        await agent.start(asked)
        for percent in (10, 20, 30):
            await until(partial(shows, f"loading {percent}%"))
            file_in(config, asked, f"go{percent}").touch()
        await ended(agent, asked.attempt_id)
    assert await texts(neighbours, asked) == ["loaded"]


async def test_a_full_log_stream_makes_lines_wait_and_loses_none(
    config: AgentConfig, neighbours: Neighbours, nats_server: NatsServer
) -> None:
    asked = order("python3", "-c", NOISE)
    provisioner = await nats.connect(nats_server.url, nkeys_seed_str=nats_server.seed(PROVISIONER))
    try:
        jetstream = provisioner.jetstream(timeout=5)
        small = (await jetstream.stream_info(LOGS)).config
        small.max_bytes = 700_000
        await jetstream.update_stream(small)
        async with running(config) as agent:
            await agent.start(asked)
            await until(partial(is_nearly_full, jetstream, 400_000))
            frames: list[LogFrame] = []
            while not frames or not frames[-1].last:
                frames += await taken(jetstream)
                await asyncio.sleep(0.02)
            await ended(agent, asked.attempt_id)
    finally:
        await provisioner.close()
    lines = [line for each in frames for line in Slice.from_message(each.slice).lines() if line.stream == "stdout"]
    assert [int(line.text.split()[0]) for line in lines] == list(range(6000))


async def is_nearly_full(jetstream: JetStreamContext, size_bytes: int) -> bool:
    return (await jetstream.stream_info(LOGS)).state.bytes > size_bytes


async def taken(jetstream: JetStreamContext) -> list[LogFrame]:
    """The frames that are there, which are gone then: as when storage has acknowledged them."""
    state = (await jetstream.stream_info(LOGS)).state
    frames = []
    for number in range(state.first_seq, state.last_seq + 1):
        frames.append(LogFrame.from_wire((await jetstream.get_msg(LOGS, number)).data or b""))
        await jetstream.delete_msg(LOGS, number)
    return frames


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("away_s", [60, 600])
async def test_nats_may_be_away_for_long_while_a_job_prints(
    config: AgentConfig, neighbours: Neighbours, nats_server: NatsServer, away_s: int
) -> None:
    asked = order("n=0; while [ ! -e go ]; do n=$((n+1)); echo $n; sleep 0.01; done; echo $n >last")
    async with running(config) as agent:
        await agent.start(asked)
        await until(lambda: neighbours.frames(asked.job_id))
        nats_server.kill()
        await asyncio.sleep(away_s)
        nats_server.start()
        file_in(config, asked, "go").touch()
        await ended(agent, asked.attempt_id)
        last = int(file_in(config, asked, "last").read_text())
    assert await texts(neighbours, asked) == [str(number) for number in range(1, last + 1)]
