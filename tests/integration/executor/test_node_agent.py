"""The node agent without Ray: real sandboxes, a real NATS, real files."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import urllib.request
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from libs.common.contracts.messages import Environment, Execution, Input, JobTemplate, ModelOutput, Resources
from libs.common.ids import new_id
from services.executor.adapters.agent import node_agent, tries
from services.executor.adapters.agent.node_agent import NodeAgent
from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.adapters.runtimes import cgroup
from services.executor.ports import AgentConfig, StartOrder
from tests.integration.executor.world import PROJECT, TEAM, Neighbours, reports, until
from tests.support.disks import small_disk_at
from tests.support.nats import NatsServer

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[3]
NODE = "n" * 56


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


async def never() -> bool:
    return False


@asynccontextmanager
async def running(config: AgentConfig) -> AsyncIterator[NodeAgent]:
    agent = NodeAgent(NODE, config, never)
    await agent.open()
    try:
        yield agent
    finally:
        await agent.close()


def order(*command: str, **template: object) -> StartOrder:
    return StartOrder(
        attempt_id=new_id("attempt"),
        job_id=new_id("job"),
        number=1,
        team_id=TEAM,
        project_id=PROJECT,
        experiment_id="",
        template=JobTemplate(command=command, **template),
        token="nbla_secret",
        team_uid=61001,
    )


def file_in(config: AgentConfig, asked: StartOrder, name: str) -> Path:
    """A file of the job's workspace, for which it waits or which it makes."""
    return Path(config.node_dir) / "attempts" / asked.attempt_id / "workspace" / name


async def has_ended(config: AgentConfig, asked: StartOrder) -> None:
    """Waits for the end of the process itself, of which no agent need have heard."""
    folder = AttemptFolder(Path(config.node_dir) / "attempts" / asked.attempt_id)
    await until(lambda: asyncio.to_thread(folder.read_exit))


async def ended(agent: NodeAgent, attempt_id: str) -> Execution:
    async def look() -> Execution | None:
        news = {each.attempt_id: each for each in (await agent.look({attempt_id: "asked"})).news}
        found = news.get(attempt_id)
        return found if found and found.state == "ended" else None

    found: Execution = await until(look)
    return found


async def texts(neighbours: Neighbours, asked: StartOrder, stream: str = "stdout") -> list[str]:
    return [line.text for line in await neighbours.log(asked.job_id) if line.stream == stream]


async def test_a_job_is_run_and_its_log_begins_with_its_environment(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    async with running(config) as agent:
        asked = order("echo hello; exit 3")
        await agent.start(asked)
        end = await ended(agent, asked.attempt_id)
    lines = await neighbours.log(asked.job_id)
    assert [line.stream for line in lines] == ["nabla", "nabla", "stdout", "nabla"]
    assert lines[0].text.startswith("environment: default (Python 3.")
    assert lines[2].text == "hello"
    assert lines[3].text.startswith("exit code 3, peak memory ")
    assert (end.reason, end.exit_code, end.node_id) == ("exited", 3, NODE)
    assert [frame.last for frame in await neighbours.frames(asked.job_id)][-1]
    states = [each.execution.state for each in await reports(neighbours)]
    assert states == ["running", "finishing", "ended"]


async def test_a_job_has_the_network_that_it_asks_for_and_the_node_says_how_far_it_goes(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    port = config.front_door.rsplit(":", 1)[1]
    knock = f"exec 3<>/dev/tcp/127.0.0.1/{port} && echo open"
    async with running(config) as agent:
        view = await agent.look({})
        if view.isolation != "bwrap":
            pytest.skip(view.isolation_detail)
        heard = {}
        for network in ("none", "platform", ""):
            asked = order("bash", "-c", knock, network=network)
            await agent.start(asked)
            heard[network] = (await ended(agent, asked.attempt_id)).exit_code
            told = (await neighbours.log(asked.job_id))[1].text
            assert f"network: {network or config.job_network}" in told
    assert heard == {"none": 1, "platform": 0, "": 0}
    assert view.network in ("full", "loopback")
    assert f"network: {view.network}" in view.isolation_detail


async def test_an_order_told_twice_is_run_once(config: AgentConfig, neighbours: Neighbours) -> None:
    async with running(config) as agent:
        asked = order("echo once >> /storage/ran; echo done")
        await asyncio.gather(agent.start(asked), agent.start(replace(asked, token="nbla_other")))
        await ended(agent, asked.attempt_id)
        await agent.start(asked)
        later = order("true")
        await agent.start(later)
        await ended(agent, later.attempt_id)
    assert (Path(config.storage_root) / TEAM / "ran").read_text() == "once\n"
    assert (await texts(neighbours, asked)) == ["done"]


async def test_workspace_and_inputs_are_there_and_the_environment_is_the_promised_one(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    workspace = neighbours.put_workspace({"train.py": b"import nabla\nprint('trained', nabla.__name__)\n"})
    model = neighbours.put_fileset({"model.bin": b"weights"}, "model")
    asked = order(
        "python train.py; cat in/model.bin; echo; echo $NABLA_TOKEN $NABLA_TEAM_ID $NABLA_ATTEMPT $MINE; pwd",
        workspace_id=workspace,
        inputs=(Input(fileset_id=model, path="in"),),
        env={"MINE": "yes", "NABLA_TOKEN": "stolen"},
    )
    async with running(config) as agent:
        await agent.start(asked)
        await ended(agent, asked.attempt_id)
        again = order("cat train.py", workspace_id=workspace)
        questions = neighbours.asked.count("ListFiles")
        await agent.start(again)
        await ended(agent, again.attempt_id)
    assert (await texts(neighbours, asked)) == [
        "trained nabla",
        "weights",
        f"nbla_secret {TEAM} 1 yes",
        "/workspace",
    ]
    assert len(await texts(neighbours, again)) == 2
    assert neighbours.asked.count("ListFiles") == questions, "the workspace is cached"


async def test_artifacts_and_models_are_kept_without_following_links(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    asked = order(
        "mkdir /artifacts/m; echo w > /artifacts/m/w.bin; echo r > /artifacts/r.txt; ln -s /etc/passwd /artifacts/p",
        models=(ModelOutput(name="digits", path="m", framework="sklearn"),),
    )
    async with running(config) as agent:
        neighbours.objects.away = True
        await agent.start(asked)
        await until(lambda: asyncio.to_thread(lambda: neighbours.objects.asked > 2 * 2))  # both files, and again
        assert "ended" not in [each.execution.state for each in await reports(neighbours)]
        neighbours.objects.away = False
        await ended(agent, asked.attempt_id)
    assert neighbours.sealed("artifacts", asked.job_id) == {"m/w.bin": b"w\n", "r.txt": b"r\n"}
    assert neighbours.sealed("model", asked.job_id) == {"w.bin": b"w\n"}
    assert [(model.name, model.framework) for model in neighbours.models] == [("digits", "sklearn")]


async def test_what_cannot_be_kept_is_named_and_the_rest_is_kept(config: AgentConfig, neighbours: Neighbours) -> None:
    asked = order(
        "mkdir /artifacts/m; echo fine > /artifacts/fine; for n in 1 2 3 4 5 6 7; do touch /artifacts/m/$n'\\'; done",
        models=(ModelOutput(name="digits", path="m"),),
    )
    async with running(config) as agent:
        await agent.start(asked)
        end = await ended(agent, asked.attempt_id)
    assert neighbours.sealed("artifacts", asked.job_id) == {"fine": b"fine\n"}
    assert neighbours.models == []
    told = [text for text in await texts(neighbours, asked, "nabla") if text.startswith(("artifacts", "model"))]
    assert told[0] == "artifacts: 1 files kept"
    assert told[1] == "artifacts: left out: m/1\\\\: its name holds a control character or a backslash"
    assert told[6] == "artifacts: left out: 2 more"
    assert told[7].startswith("model: digits not registered: 1\\\\: its name holds")
    assert (end.reason, end.exit_code) == ("exited", 0)
    assert "left out: m/1" in end.detail


async def test_a_running_job_is_found_again_and_no_line_is_lost_or_double(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    part = "while [ $part != 0 ] && [ ! -e go$part ]; do sleep 0.02; done; for i in $(seq 20); do echo $part $i; done"
    asked = order(f"for part in 0 1 2 3; do {part}; done; exit 4")
    async with running(config) as agent:
        await agent.start(asked)
        await until(lambda: _has_said(neighbours, asked, "0 20"))
    for part in (1, 2):
        file_in(config, asked, f"go{part}").touch()
        async with running(config):
            await until(partial(_has_said, neighbours, asked, f"{part} 20"))
    file_in(config, asked, "go3").touch()
    async with running(config) as agent:
        end = await ended(agent, asked.attempt_id)
    assert (end.reason, end.exit_code) == ("exited", 4)
    assert await texts(neighbours, asked) == [f"{part} {number}" for part in range(4) for number in range(1, 21)]


async def test_the_end_of_a_job_that_nobody_watched_is_reported(config: AgentConfig, neighbours: Neighbours) -> None:
    asked = order("while [ ! -e go ]; do sleep 0.02; done; echo alone")
    async with running(config) as agent:
        await agent.start(asked)
        await until(lambda: _started(config, asked))
    file_in(config, asked, "go").touch()
    await has_ended(config, asked)
    async with running(config) as agent:
        await ended(agent, asked.attempt_id)
    assert await texts(neighbours, asked) == ["alone"]


async def _started(config: AgentConfig, asked: StartOrder) -> bool:
    return AttemptFolder(Path(config.node_dir) / "attempts" / asked.attempt_id).read_started() is not None


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ({"timeout_s": 0.5}, "timed_out"),
        ({"resources": Resources(memory_bytes=60_000_000)}, "out_of_memory"),
    ],
)
async def test_a_job_that_passes_its_bounds_is_ended(
    template: dict[str, object], reason: str, config: AgentConfig, neighbours: Neighbours
) -> None:
    asked = order("python -c 'import time; x = bytearray(200_000_000); time.sleep(20)'", **template)
    async with running(config) as agent:
        await agent.start(asked)
        end = await ended(agent, asked.attempt_id)
    assert end.reason == reason
    last = (await texts(neighbours, asked, "nabla"))[-1]
    said = r"killed: out of memory, limit 60\.0 MB, peak memory \d+\.\d MB, \d+\.\d s"
    assert re.fullmatch(said if reason == "out_of_memory" else r"ended: its time limit of 0\.5 s is over, .*", last)


async def test_a_stopped_job_ends_and_one_stopped_before_its_start_never_starts(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    async with running(config) as agent:
        asked, early = order("echo up; sleep 60"), order("echo never")
        await agent.start(asked)
        await until(lambda: texts(neighbours, asked))
        assert await agent.stop(asked.attempt_id, 5.0, "cancelled")
        assert (await ended(agent, asked.attempt_id)).reason == "stopped"
        assert not await agent.stop(early.attempt_id, 5.0, "cancelled")
        await agent.start(early)
        assert (await ended(agent, early.attempt_id)).reason == "stopped"
    assert await texts(neighbours, early) == []


async def test_a_stop_is_heard_while_the_workspace_cannot_be_fetched(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    asked = order("true", workspace_id=neighbours.put_workspace({"a": b"a"}))
    neighbours.objects.away = True
    async with running(config) as agent:
        await agent.start(asked)
        await until(lambda: asyncio.to_thread(lambda: neighbours.objects.asked))
        await agent.stop(asked.attempt_id, 5.0, "cancelled")
        assert (await ended(agent, asked.attempt_id)).reason == "stopped"


async def test_a_workspace_for_which_the_disk_has_no_room_is_refused_and_takes_none(
    config: AgentConfig, neighbours: Neighbours, node_dir: Path
) -> None:
    large = neighbours.put_workspace({"large": os.urandom(12_000_000)})
    many = neighbours.put_workspace({"zeros": bytes(12_000_000)})
    with small_disk_at(node_dir / "node", 8) as disk:
        async with running(config) as agent:
            for workspace in (large, many):
                asked = order("true", workspace_id=workspace)
                await agent.start(asked)
                end = await ended(agent, asked.attempt_id)
                assert end.reason == "start_failure"
                assert "No space left on device" in end.detail
        used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*"))
    assert used < 1_000_000


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({"workspace_id": "fs0none"}, "the workspace cannot be fetched: There is no file set fs0none."),
        (
            {"environment": Environment(kind="venv", path="/nowhere")},
            "/nowhere is not a Python environment on this node",
        ),
        (
            {"environment": Environment(kind="requirements", requirements="-r /etc/passwd")},
            "only files of the workspace",
        ),
    ],
)
async def test_what_cannot_be_staged_is_refused_with_a_reason_in_the_log(
    template: dict[str, object], said: str, config: AgentConfig, neighbours: Neighbours
) -> None:
    asked = order("true", **template)
    async with running(config) as agent:
        await agent.start(asked)
        end = await ended(agent, asked.attempt_id)
    assert end.reason == "refused"
    assert said in end.detail
    assert any(said in text for text in await texts(neighbours, asked, "nabla"))


async def test_a_killed_shim_is_lost_and_takes_the_job_with_it(config: AgentConfig, neighbours: Neighbours) -> None:
    asked = order("sleep 60")
    async with running(config) as agent:
        await agent.start(asked)
        await until(lambda: _started(config, asked))
        shim = AttemptFolder(Path(config.node_dir) / "attempts" / asked.attempt_id).read_shim()
        assert shim
        os.kill(shim.pid, 9)
        assert (await ended(agent, asked.attempt_id)).reason == "lost"
        groups = cgroup.folders_of(asked.attempt_id)
        await until(lambda: asyncio.to_thread(lambda: not any(map(_has_processes, groups))))
        await agent.drop(asked.attempt_id)
    assert not any(group.exists() for group in groups)


def _has_processes(group: Path) -> bool:
    """Also the group of one that was killed a moment ago."""
    return group.exists() and bool((group / "cgroup.procs").read_text())


async def test_a_dead_zygote_is_replaced(config: AgentConfig, neighbours: Neighbours) -> None:
    async with running(config) as agent:
        assert agent._zygote
        agent._zygote.process.kill()
        agent._zygote.process.wait()
        asked = order("echo back")
        await agent.start(asked)
        await ended(agent, asked.attempt_id)
    assert await texts(neighbours, asked) == ["back"]


async def test_a_stop_is_heard_while_no_zygote_answers(config: AgentConfig, neighbours: Neighbours) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    waiting = [order("echo never") for _ in range(3)]
    async with running(config) as agent:
        assert agent._zygote
        zygote = agent._zygote.process
        zygote.send_signal(signal.SIGSTOP)
        try:
            for asked in waiting:
                await agent.start(asked)
                spec = Path(config.node_dir) / "attempts" / asked.attempt_id / "spec.json"
                await until(lambda spec=spec: asyncio.to_thread(spec.exists))
            for asked in waiting:
                await agent.stop(asked.attempt_id, 5.0, "cancelled")
                assert (await ended(agent, asked.attempt_id)).reason == "stopped"
        finally:
            zygote.send_signal(signal.SIGCONT)
        after = order("echo fine")
        await agent.start(after)
        assert (await ended(agent, after.attempt_id)).exit_code == 0
    assert [await texts(neighbours, asked) for asked in waiting] == [[], [], []]


async def test_a_start_that_breaks_each_time_is_told_as_the_platforms_failure(
    config: AgentConfig, neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tries, "PAUSES_S", (0.01, 0.01))
    asked = order("true", workspace_id=neighbours.put_workspace({"a": b"a"}))
    neighbours.garbled.add("ListFiles")
    async with running(config) as agent:
        await agent.start(asked)
        end = await ended(agent, asked.attempt_id)
    assert neighbours.asked.count("ListFiles") == 3
    assert (end.reason, end.exit_code) == ("start_failure", None)
    assert "the platform failed to start the job, 3 times: " in end.detail
    assert any("failed to start the job" in text for text in await texts(neighbours, asked, "nabla"))


async def test_a_start_that_broke_once_goes_on(
    config: AgentConfig, neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tries, "PAUSES_S", (0.01,) * 5000)
    asked = order("cat a", workspace_id=neighbours.put_workspace({"a": b"a\n"}))
    neighbours.garbled.add("ListFiles")
    async with running(config) as agent:
        await agent.start(asked)
        await until(lambda: asyncio.to_thread(lambda: neighbours.asked.count("ListFiles") >= 2))
        neighbours.garbled.clear()
        assert (await ended(agent, asked.attempt_id)).exit_code == 0
    assert await texts(neighbours, asked) == ["a"]


async def test_artifacts_that_the_platform_fails_to_keep_stay_on_the_node(
    config: AgentConfig, neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tries, "PAUSES_S", (0.01, 0.01))
    asked, failed = order("echo w > /artifacts/w"), order("echo v > /artifacts/v; exit 3")
    neighbours.garbled.add("OpenFileset")
    async with running(config) as agent:
        for each in (asked, failed):
            await agent.start(each)
        end, other = await ended(agent, asked.attempt_id), await ended(agent, failed.attempt_id)
        for each in (asked, failed):
            await agent.drop(each.attempt_id)
    aside = Path(config.node_dir) / "unkept"
    assert (aside / asked.attempt_id / "w").read_text() == "w\n"
    assert (aside / failed.attempt_id / "v").read_text() == "v\n"
    assert (end.reason, end.exit_code) == ("refused", None)
    assert end.detail.startswith("the platform failed to keep what the job left, 3 times: ")
    assert (other.reason, other.exit_code) == ("exited", 3)
    said = await texts(neighbours, asked, "nabla")
    assert any(text.endswith(str(aside / asked.attempt_id)) for text in said)


async def test_an_agent_that_could_not_open_its_folder_can_try_again(
    config: AgentConfig, neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_agent, "LOCK_PATIENCE_S", 0.5)
    in_the_way = Path(config.node_dir) / "contact.json"
    in_the_way.mkdir(parents=True)
    agent = NodeAgent(NODE, config, never)
    with pytest.raises(IsADirectoryError):
        await agent.open()
    in_the_way.rmdir()
    await agent.open()
    await agent.close()


async def test_spoiled_records_of_one_attempt_do_not_keep_the_others_from_going_on(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    spoiled, whole = order("sleep 1000"), order("while [ ! -e go ]; do sleep 0.02; done; echo went on")
    async with running(config) as agent:
        for asked in (spoiled, whole):
            await agent.start(asked)
            await until(partial(_started, config, asked))
    folder = AttemptFolder(Path(config.node_dir) / "attempts" / spoiled.attempt_id)
    (folder.path / "words.jsonl").write_text("no record\n")
    (folder.path.parent / "stray").touch()
    (folder.path.parent / whole.attempt_id / "workspace" / "go").touch()
    async with running(config) as agent:
        await ended(agent, whole.attempt_id)
        assert spoiled.attempt_id not in (await agent.look({})).held
    assert await texts(neighbours, whole) == ["went on"]
    end = await until(lambda: asyncio.to_thread(folder.read_exit))
    assert end.reason == "stopped"


async def test_contact_is_kept_after_a_question_that_failed(config: AgentConfig, neighbours: Neighbours) -> None:
    asked: list[int] = []

    async def fails_twice() -> bool:
        asked.append(len(asked))
        if len(asked) <= 2:
            raise RuntimeError("Ray is restarting")
        return True

    contact = Path(config.node_dir, "contact.json")
    agent = NodeAgent(NODE, replace(config, node_fence_s=0.2), fails_twice)
    await agent.open()
    try:
        written = await asyncio.to_thread(contact.read_bytes)
        await until(lambda: asyncio.to_thread(lambda: len(asked) > 3 and contact.read_bytes() != written))
    finally:
        await agent.close()


async def test_the_log_goes_on_when_the_disk_refused_it_for_a_while(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    command = "echo one; for n in two three; do while [ ! -e $n ]; do sleep 0.02; done; echo $n; done; sleep 1000"
    asked = order(command)
    folder = Path(config.node_dir) / "attempts" / asked.attempt_id
    async with running(config) as agent:
        await agent.start(asked)
        await until(lambda: _has_said(neighbours, asked, "one"))
        (folder / "shipping.json").unlink()
        (folder / "shipping.json").mkdir()
        (folder / "workspace" / "two").touch()
        await until(lambda: asyncio.to_thread(lambda: list(folder.glob(".shipping.json.*"))))
        (folder / "shipping.json").rmdir()
        (folder / "workspace" / "three").touch()
        await until(lambda: _has_said(neighbours, asked, "three"))
        await agent.stop(asked.attempt_id, 0.0, "enough")
        await ended(agent, asked.attempt_id)
    assert await texts(neighbours, asked) == ["one", "two", "three"]


async def _has_said(neighbours: Neighbours, asked: StartOrder, text: str) -> bool:
    return text in await texts(neighbours, asked)


async def test_an_object_store_that_hangs_holds_up_no_other_job(config: AgentConfig, neighbours: Neighbours) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    keeps = order("for n in 1 2 3 4; do echo $n > /artifacts/$n; done")
    other = order("echo fine")
    async with running(config) as agent:
        neighbours.objects.answers.clear()
        await agent.start(keeps)
        await until(lambda: asyncio.to_thread(lambda: neighbours.objects.asked >= 2))
        await agent.start(other)
        assert (await ended(agent, other.attempt_id)).exit_code == 0
        neighbours.objects.answers.set()
        await ended(agent, keeps.attempt_id)
    assert len(neighbours.sealed("artifacts", keeps.job_id)) == 4


async def test_only_what_is_over_is_dropped(config: AgentConfig, neighbours: Neighbours) -> None:
    asked = order("while [ ! -e go ]; do sleep 0.02; done")
    async with running(config) as agent:
        await agent.start(asked)
        await agent.drop(asked.attempt_id)
        file_in(config, asked, "go").touch()
        assert (await ended(agent, asked.attempt_id)).exit_code == 0
        await agent.drop(asked.attempt_id)
        assert (await agent.look({})).held == frozenset()
    assert not (Path(config.node_dir) / "attempts" / asked.attempt_id).exists()


async def test_nats_may_be_away_while_a_job_runs(
    config: AgentConfig, neighbours: Neighbours, nats_server: NatsServer
) -> None:
    asked = order("echo line 1; while [ ! -e go ]; do sleep 0.02; done; for i in $(seq 2 30); do echo line $i; done")
    async with running(config) as agent:
        await agent.start(asked)
        await until(lambda: texts(neighbours, asked))
        nats_server.kill()
        file_in(config, asked, "go").touch()
        await has_ended(config, asked)
        nats_server.start()
        await ended(agent, asked.attempt_id)
    await until(lambda: _is_connected(neighbours))
    assert await texts(neighbours, asked) == [f"line {number}" for number in range(1, 31)]


async def _is_connected(neighbours: Neighbours) -> bool:
    return bool(neighbours.client.is_connected)


async def test_a_flood_of_output_arrives_whole(config: AgentConfig, neighbours: Neighbours) -> None:
    asked = order("seq 200000")
    async with running(config) as agent:
        await agent.start(asked)
        await ended(agent, asked.attempt_id)
    found = await texts(neighbours, asked)
    assert found == [str(number) for number in range(1, 200_001)]


async def test_ports_lead_in_and_the_front_door_leads_out(config: AgentConfig, neighbours: Neighbours) -> None:
    neighbours.objects.objects["/hello"] = b"from outside"
    ask = "import os, urllib.request as u; print(u.urlopen(os.environ['NABLA_API_URL'] + '/hello').read().decode())"
    asked = order(f'python -c "{ask}"; cd /tmp; echo inside > index.html; python -m http.server 3000', ports=(3000,))
    async with running(config) as agent:
        await agent.start(asked)
        address = await until(lambda: _address(agent, asked))
        body = await until(lambda: asyncio.to_thread(_fetch, f"http://{address}/"))
        await agent.stop(asked.attempt_id, 0.0, "enough")
        await ended(agent, asked.attempt_id)
    assert body == b"inside\n"
    assert (await texts(neighbours, asked))[0] == "from outside"


async def _address(agent: NodeAgent, asked: StartOrder) -> str:
    news = (await agent.look({asked.attempt_id: "asked"})).news
    return next((each.addresses.get("3000", "") for each in news if each.attempt_id == asked.attempt_id), "")


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            body: bytes = answer.read()
            return body
    except OSError:
        return b""


async def test_without_walls_the_same_job_runs_in_its_own_folders(
    config: AgentConfig, neighbours: Neighbours, node_dir: Path
) -> None:
    node_dir.chmod(0o711)
    workspace = neighbours.put_workspace({"a.txt": b"a\n"})
    command = "cat a.txt; echo kept > $NABLA_ARTIFACTS/x; echo $NABLA_ISOLATION; python -c 'import nabla'"
    asked = order(command, workspace_id=workspace)
    async with running(replace(config, isolation="process", default_environment=str(ROOT / ".venv-serving"))) as agent:
        await agent.start(asked)
        end = await ended(agent, asked.attempt_id)
    assert (await texts(neighbours, asked))[:2] == ["a", "process"]
    assert (end.isolation, end.reason) == ("process", "exited")
    assert neighbours.sealed("artifacts", asked.job_id) == {"x": b"kept\n"}
