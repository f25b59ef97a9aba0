"""The executor is killed at every step of an attempt: the attempt runs once, is stopped, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from libs.common.contracts.messages import LogSealed, StopExecution
from services.executor.routes import routes
from tests.integration.executor.on_ray import Onlooker, start, stdout
from tests.integration.executor.world import TEAM, Neighbours, ObjectStore, grants, meet_neighbours, until
from tests.support.leftovers import left_by
from tests.support.nats import NatsServer, running_nats
from tests.support.ray import RayHead, running_ray

pytestmark = [pytest.mark.integration, pytest.mark.full, pytest.mark.timeout(180)]
ROOT = Path(__file__).resolve().parents[3]
DRIVER = (ROOT / "services/executor/loops/driver.py").read_text()
POINTS = re.findall(r'crash_point\("([a-z_.]+)"\)', DRIVER)
# Passed with every message and every look at the nodes: once in the middle of things.
COMMON = [
    f"executor.{point}:6" for point in ("before_commit", "after_commit", "after_commit_before_ack", "after_publish")
]
KILLED = 137


@pytest.fixture(scope="module")
def ray_head() -> Iterator[RayHead]:
    with running_ray() as head:
        yield head


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="nabla-home-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
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


@pytest.fixture
async def onlooker(neighbours: Neighbours) -> Onlooker:
    looking = Onlooker()
    await looking.listen(neighbours)
    return looking


class ExecutorProcess:
    """The service as the supervisor runs it: ended by a fault, it is started again without one."""

    def __init__(self, home: Path, server: NatsServer, head: RayHead, front_door: str) -> None:
        self._log = (home / "executor.log").open("ab")
        self._env = head.environment | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'libs/client'}",
            "NABLA_HOME": str(home),
            "NABLA_NATS_URL": server.url,
            "NABLA_NATS_KEYS": str(server.folder / "keys"),
            "NABLA_RAY_ADDRESS": head.address,
            "NABLA_FRONT_DOOR": front_door,
            "NABLA_RECONCILE_S": "0.5",
            "NABLA_LOOK_S": "0.5",
            "NABLA_KEEP_FOLDER_S": "0",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, fault: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services", "executor"],
            env=self._env | ({"NABLA_FAULT": fault} if fault else {}),
            cwd=ROOT,
            stdout=self._log,
            stderr=self._log,
        )

    async def restart_when_killed(self) -> None:
        assert self.process
        code = await asyncio.to_thread(self.process.wait, 60)
        assert code == KILLED, "the point was never passed"
        self.start()

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        self._log.close()


@pytest.mark.parametrize("point", POINTS + COMMON)
async def test_an_executor_killed_there_goes_on_as_if_nothing_had_been(
    point: str, home: Path, server: NatsServer, ray_head: RayHead, neighbours: Neighbours, onlooker: Onlooker
) -> None:
    executor = ExecutorProcess(home, server, ray_head, neighbours.objects.url)
    executor.start(fault=point)
    guard = asyncio.create_task(executor.restart_when_killed())
    try:
        node_id = await onlooker.ready_node()
        asked = start(node_id, "echo once >> /storage/$NABLA_JOB_ID; echo up; sleep 600")
        await neighbours.send(asked, asked.attempt_id)
        await until(lambda: stdout(neighbours, asked.job_id))
        await neighbours.send(StopExecution(attempt_id=asked.attempt_id, reason="enough"), asked.attempt_id)
        end = await onlooker.end_of(asked.attempt_id, 60)
        assert (end.reason, end.detail) == ("stopped", "enough")
        await neighbours.send(LogSealed(job_id=asked.job_id), asked.job_id)

        async def clean() -> bool:
            return not left_by([asked.attempt_id], [home / "node"])

        await until(clean, 60)
        await guard
        assert (home / "storage" / TEAM / asked.job_id).read_text() == "once\n"
        assert await stdout(neighbours, asked.job_id) == ["up"]
    finally:
        guard.cancel()
        executor.close()


def test_there_is_a_point_on_both_sides_of_each_outside_call() -> None:
    calls = set(re.findall(r"self\._cluster\.(\w+)\(", DRIVER)) - {"close"}
    named = {"start": "tell"}
    wanted = {f"executor.{side}_{named.get(call, call)}" for call in calls for side in ("before", "after")}
    assert wanted == set(POINTS)
    assert os.environ.get("NABLA_FAULT", "") == ""
