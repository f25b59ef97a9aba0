"""What a running attempt uses, read from real processes, in each class of isolation and of limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from libs.common.contracts.messages import RecordUsage
from libs.common.errors import Unavailable
from services.executor.adapters.agent.metering import INTERVALS_S, Metered, Metering
from services.executor.adapters.agent.usage import Meter, Subject, rates
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, Isolation
from services.executor.adapters.attempts.processes import Tree
from tests.integration.executor.attempts import Node, eventually, running_node, said, started, why_no_bwrap

pytestmark = pytest.mark.integration
MIB = 1024 * 1024
# It uses what it says it does, and goes on until it is stopped.
BUSY = (
    "import os, time\nheld = b'x' * 80 * 2**20\n"
    "with open('f', 'wb') as f: f.write(held[: 2**24]); os.fsync(f.fileno())\n"
    "print('ready', flush=True)\nwhile True: pass\n"
)


@pytest.fixture(scope="module", params=["limits by the kernel", "limits by sampling"])
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with running_node(control_groups=request.param == "limits by the kernel") as node:
        yield node


@pytest.fixture(params=["bwrap", "process"])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    if request.param == "bwrap" and why_no_bwrap():
        pytest.skip(why_no_bwrap())
    chosen: Isolation = request.param
    return chosen


def subject_of(folder: AttemptFolder) -> Subject:
    record, shim = started(folder), folder.read_shim()
    assert shim is not None
    return Subject(folder.path.name, shim.pid, record.pid, record.isolation != "process")


def metered(folder: AttemptFolder) -> Metered:
    return Metered(subject_of(folder), "t1", "js1", 1, (), started(folder).at_us)


def test_a_busy_job_shows_its_cpu_memory_and_disk(node: Node, isolation: Isolation) -> None:
    folder = node.start(["python3", "-c", BUSY], isolation=isolation)
    meter = Meter(subject_of(folder))
    first = meter.read(Tree())
    eventually(lambda: said(folder, "ready"), "the job's first line")
    written = meter.read(Tree())
    began = time.monotonic()
    eventually(lambda: meter.cpu_s() > written.cpu_s + 0.2, "the job's use of the CPU")
    now = meter.read(Tree())
    shown = rates(written, now, time.monotonic() - began)
    assert 0 < shown["system/cpu_percent"] < 250
    assert 80 * MIB < shown["system/memory_bytes"] < 400 * MIB
    assert (now.written_bytes or 0) - (first.written_bytes or 0) >= 16 * MIB
    assert shown["system/disk_write_bytes_per_s"] >= 0
    folder.request_stop(0, "over")
    node.end_of(folder)


async def test_a_sleeping_job_is_looked_at_less_and_less_and_says_nothing(node: Node, isolation: Isolation) -> None:
    folder = node.start("echo ready; sleep 1000", isolation=isolation)
    eventually(lambda: said(folder, "ready"), "the job's first line")
    attempt = metered(folder)
    told: list[RecordUsage] = []

    async def send(message: RecordUsage, _team_id: str) -> None:
        told.append(message)

    metering = Metering(lambda: [attempt], send)
    clock_us = attempt.started_us
    for _ in range(60):
        clock_us += 1_000_000
        metering._sample({attempt.subject.attempt_id: attempt}, clock_us)
    await metering.ship()
    (message,) = told
    steps = sorted({point.step for point in message.usages[0].points})
    assert steps[0] <= 3
    assert len(steps) <= 8
    assert all(step % INTERVALS_S[-1] == 0 for step in steps[5:])
    folder.request_stop(0, "over")
    node.end_of(folder)


async def test_what_the_registry_does_not_take_comes_again(node: Node) -> None:
    folder = node.start(["python3", "-c", "print('ready', flush=True)\nwhile True: pass"], isolation="process")
    eventually(lambda: said(folder, "ready"), "the job's first line")
    attempt, silent, told = metered(folder), True, list[RecordUsage]()

    async def send(message: RecordUsage, _team_id: str) -> None:
        await asyncio.sleep(0)
        if silent:
            raise Unavailable("service_silent", "The registry does not answer.")
        told.append(message)

    metering = Metering(lambda: [attempt], send)
    for _ in range(3):
        await metering.sample()
        await metering.ship()
        await asyncio.sleep(1)
    silent = False
    await metering.ship()
    await metering.ship()
    (message,) = told
    assert {point.name for point in message.usages[0].points} >= {"system/cpu_percent", "system/memory_bytes"}
    assert len({point.step for point in message.usages[0].points}) >= 1
    folder.request_stop(0, "over")
    node.end_of(folder)
