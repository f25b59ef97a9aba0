"""A service's loops: what they wait for, and what ends the process, so that it starts again from its database."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError

from libs.common import service
from libs.common.errors import DiskFull, StaleRevision
from libs.common.locks import LockLost

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import asyncio, sys, uvloop
from libs.common.service import _coroutine, _end_on_error

async def die():
    raise ValueError("no more")

async def main():
    asyncio.create_task(_coroutine(die)).add_done_callback(_end_on_error)
    await asyncio.sleep(60)

(uvloop if sys.argv[1] == "uvloop" else asyncio).run(main())
"""


class _Locked(Exception):
    sqlite_errorname = "SQLITE_BUSY"


OUTAGES: dict[str, Exception] = {
    "full": DiskFull("/srv"),
    "busy": OperationalError("UPDATE outbox", {}, _Locked()),
    "gone": ConnectionRefusedError(),
}


def failing_twice(error: Exception) -> tuple[Callable[[], Awaitable[None]], list[int]]:
    passes: list[int] = []

    async def loop() -> None:
        passes.append(1)
        if len(passes) < 3:
            raise error

    return loop, passes


@pytest.mark.parametrize("name", OUTAGES)
async def test_a_loop_begins_again_after_an_outage_of_its_database(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "OUTAGE_PAUSE_S", 0.0)
    loop, passes = failing_twice(OUTAGES[name])
    await service._coroutine(loop)
    assert len(passes) == 3


@pytest.mark.parametrize("error", [ValueError(), StaleRevision("note", "n", 1), LockLost("x", make_url("sqlite://"))])
async def test_a_loop_with_any_other_error_does_not(error: Exception) -> None:
    loop, passes = failing_twice(error)
    with pytest.raises(type(error)):
        await service._coroutine(loop)
    assert len(passes) == 1


@pytest.mark.parametrize("kind", ["uvloop", "asyncio"])
def test_a_dead_loop_ends_the_process(kind: str) -> None:
    command = [sys.executable, "-c", PROGRAM, kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 70, done.stderr
    assert "a loop died" in done.stderr


def test_cancelling_is_no_death() -> None:
    async def main() -> None:
        task = asyncio.create_task(asyncio.sleep(60))
        task.add_done_callback(service._end_on_error)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
