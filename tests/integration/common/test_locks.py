"""One process per database: the second on a file is told so, on PostgreSQL it waits and takes over."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from libs.common import locks
from libs.common.locks import AlreadyHeld, LockLost, SoleWriter
from libs.common.store import async_url

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
# With the word "fork" it leaves a child behind that lives on when it is killed.
HOLD = """
import asyncio, os, sys, time
from libs.common.locks import SoleWriter
from libs.common.store import async_url

async def main():
    lock = SoleWriter(async_url(sys.argv[1]), "scheduler")
    await lock.take()
    child = os.fork() if sys.argv[2:] == ["fork"] else -1
    if child == 0:
        time.sleep(600)
    print("held", child, flush=True)
    await lock.keep()

asyncio.run(main())
"""


@contextmanager
def holding(url: str, *how: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that has the lock, and its child."""
    command = [sys.executable, "-c", HOLD, url, *how]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout
        word, child = other.stdout.readline().split()
        assert word == "held"
        yield other, int(child)
    finally:
        other.kill()
        other.wait(10)
        if other.stdout:
            other.stdout.close()


async def taken(url: str, name: str = "scheduler") -> SoleWriter:
    """The lock, as soon as nobody else has it."""
    lock = SoleWriter(async_url(url), name)
    async with asyncio.timeout(60):
        while True:
            try:
                await lock.take()
            except AlreadyHeld:
                await asyncio.sleep(0.05)
            else:
                return lock


async def is_turned_away(url: str) -> bool:
    """Whether a file is refused, or PostgreSQL lets us wait."""
    lock = SoleWriter(async_url(url), "scheduler")
    taking = asyncio.create_task(lock.take())
    async with asyncio.timeout(60):
        while not (taking.done() or lock.waits):
            await asyncio.sleep(0.02)
    taking.cancel()
    [outcome] = await asyncio.gather(taking, return_exceptions=True)
    await lock.release()
    return isinstance(outcome, AlreadyHeld if url.startswith("sqlite") else asyncio.CancelledError)


async def test_another_process_has_it_until_it_dies(database_url: str) -> None:
    with holding(database_url) as (other, _):
        assert await is_turned_away(database_url)
        other.send_signal(signal.SIGKILL)
        other.wait(10)
        lock = await taken(database_url)
        assert await is_turned_away(database_url)
        await lock.release()
        assert not await is_turned_away(database_url)


async def test_a_child_that_outlives_its_holder_does_not_keep_it(database_url: str) -> None:
    with holding(database_url, "fork") as (other, child):
        try:
            other.send_signal(signal.SIGKILL)
            other.wait(10)
            await (await taken(database_url)).release()
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


async def test_services_that_share_a_server_do_not_stand_in_each_others_way(postgres_url: str) -> None:
    url = f"{postgres_url}/postgres"
    first, other = await taken(url), await taken(url, "executor")
    assert await is_turned_away(url)
    await first.release()
    await other.release()


async def test_a_lost_session_ends_the_holder(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PULSE_S", 0.05)
    url = f"{postgres_url}/postgres"
    lock = await taken(url, "lost")
    keeping = asyncio.create_task(lock.keep())
    engine = create_async_engine(async_url(url), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        holders = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
        await connection.execute(text(holders))
    await engine.dispose()
    with pytest.raises(LockLost):
        async with asyncio.timeout(60):
            await keeping
    await lock.release()


async def test_the_error_says_which_database_and_not_its_password(tmp_path: Path) -> None:
    url = async_url("postgresql://nabla:hunter2@127.0.0.1/x")
    assert "hunter2" not in str(AlreadyHeld("scheduler", url))
    assert "scheduler" in str(AlreadyHeld("scheduler", url))
    await (await taken(f"sqlite:///{tmp_path}/a.db")).release()
    assert os.stat(tmp_path / "a.db.lock").st_mode & 0o077 == 0
