"""One writer per database."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from libs.common import locks
from libs.common.locks import AlreadyHeld, LockLost, SoleWriter
from libs.common.store import async_url

pytestmark = pytest.mark.integration

HOLD = """
import asyncio, sys
from libs.common.locks import SoleWriter
from libs.common.store import async_url

async def main():
    lock = SoleWriter(async_url(sys.argv[1]), "scheduler")
    holding = asyncio.create_task(lock.run())
    await lock.held.wait()
    print("held", flush=True)
    await holding

asyncio.run(main())
"""


async def turned_away(url: str, name: str = "scheduler") -> bool:
    lock = SoleWriter(async_url(url), name)
    running = asyncio.create_task(lock.run())
    held = asyncio.create_task(lock.held.wait())
    await asyncio.wait({running, held}, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    for task in (running, held):
        task.cancel()
    outcome = (await asyncio.gather(running, held, return_exceptions=True))[0]
    return isinstance(outcome, AlreadyHeld)


async def test_another_process_has_it_until_it_dies(database_url: str) -> None:
    root = Path(__file__).resolve().parents[3]
    other = subprocess.Popen([sys.executable, "-c", HOLD, database_url], cwd=root, stdout=subprocess.PIPE)
    try:
        assert other.stdout
        assert await asyncio.to_thread(other.stdout.readline) == b"held\n"
        assert await turned_away(database_url)
        other.send_signal(signal.SIGKILL)
        other.wait(10)
        async with asyncio.timeout(60):
            while await turned_away(database_url):
                await asyncio.sleep(0.05)
    finally:
        other.kill()
        other.wait(10)
        if other.stdout:
            other.stdout.close()


async def test_services_that_share_a_server_do_not_stand_in_each_others_way(postgres_url: str) -> None:
    url = f"{postgres_url}/postgres"
    first = SoleWriter(async_url(url), "scheduler")
    holding = asyncio.create_task(first.run())
    await asyncio.wait_for(first.held.wait(), 60)
    assert await turned_away(url)
    assert not await turned_away(url, "executor")
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)


async def test_a_lost_session_ends_the_holder(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PULSE_S", 0.05)
    url = async_url(f"{postgres_url}/postgres")
    lock = SoleWriter(url, "lost")
    holding = asyncio.create_task(lock.run())
    await asyncio.wait_for(lock.held.wait(), 60)
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        holders = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
        await connection.execute(text(holders))
    await engine.dispose()
    with pytest.raises(LockLost):
        await asyncio.wait_for(holding, 60)


async def test_the_error_says_which_database_and_not_its_password(tmp_path: Path) -> None:
    url = async_url("postgresql://nabla:hunter2@127.0.0.1/x")
    assert "hunter2" not in str(AlreadyHeld("scheduler", url))
    assert "scheduler" in str(AlreadyHeld("scheduler", url))
    await turned_away(f"sqlite:///{tmp_path}/a.db")
    assert os.stat(tmp_path / "a.db.lock").st_mode & 0o077 == 0
