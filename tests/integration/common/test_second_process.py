"""A second process of a service on the same database leaves it alone: on a file it goes, on PostgreSQL it stands by."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from libs.common.bus import Bus
from libs.common.contracts import messages as m
from libs.common.ids import new_secret
from libs.common.store import async_url
from tests.integration.common.registry_process import GRANTS, RegistryProcess, until
from tests.support.nats import NatsServer, running_nats
from tests.support.ports import free_port

pytestmark = pytest.mark.integration


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with running_nats(tmp_path / "nats", GRANTS) as server:
        yield server


@pytest.fixture
async def asker(server: NatsServer) -> AsyncIterator[Bus]:
    await server.provision()
    bus = server.bus("gateway")
    await bus.start()
    yield bus
    await bus.stop()


async def create(asker: Bus, ada: m.Principal, name: str) -> m.Project:
    return await asker.ask(m.CreateProject(name=name), m.Project, ada, key=name, timeout_s=30)


async def test_on_a_file_the_second_says_why_and_goes_and_the_first_works_on(
    server: NatsServer, asker: Bus, tmp_path: Path
) -> None:
    first, second = RegistryProcess(server, tmp_path / "home"), RegistryProcess(server, tmp_path / "home")
    try:
        running = first.start()
        ada = await first.signed_in(asker)
        # Before it hears a message, it would migrate, and put this in the place of the first token.
        first.token_file.write_text(new_secret("nbl"))
        assert await asyncio.to_thread(second.start().wait, 60) == 1
        assert "Another process runs registry on sqlite" in second.said
        assert "Traceback" not in second.said
        assert json.loads((tmp_path / "home" / "run" / "registry.json").read_text())["pid"] == running.pid
        await create(asker, ada, "digits")
        first.kill()
        # As the supervisor does: at once after the death.
        second.start()
        assert await second.signed_in(asker) == ada
        assert await create(asker, ada, "digits")
    finally:
        first.kill()
        second.kill()


async def test_on_postgresql_a_standby_waits_unready_and_takes_over(
    server: NatsServer, asker: Bus, postgres_url: str, tmp_path: Path
) -> None:
    url = await databases(postgres_url)
    ports = {name: free_port() for name in ("first", "standby", "spare")}
    first, standby, spare = (
        RegistryProcess(server, tmp_path / name, {"NABLA_DATABASE_URL": url, "NABLA_METRICS_PORT": str(port)})
        for name, port in ports.items()
    )
    try:
        first.start()
        ada = await first.signed_in(asker)
        project = await create(asker, ada, "digits")
        waiting, leaving = standby.start(), spare.start()
        for name, process in (("standby", standby), ("spare", spare)):
            await until(lambda process=process: waits(process))
            assert await status(ports[name], "livez") == 200
            assert await status(ports[name], "readyz") == 503
        assert await status(ports["first"], "readyz") == 200
        leaving.terminate()
        assert await asyncio.to_thread(leaving.wait, 60) == 0
        assert "Traceback" not in spare.said
        assert waiting.poll() is None
        first.kill()
        assert await standby.signed_in(asker) == ada
        assert await create(asker, ada, "digits") == project
    finally:
        for process in (first, standby, spare):
            process.kill()


async def databases(postgres_url: str) -> str:
    """Two empty databases, for what the registry calls `registry` and `registry_runs`."""
    name = f"t{uuid4().hex[:12]}"
    engine = create_async_engine(async_url(f"{postgres_url}/postgres"), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        for service in ("registry", "registry_runs"):
            await connection.execute(text(f'CREATE DATABASE "{name}_{service}"'))
    await engine.dispose()
    return f"{postgres_url}/{name}_{{service}}"


async def waits(process: RegistryProcess) -> bool:
    return "waits for the process that has this database" in process.said


async def status(port: int, path: str) -> int:
    async with httpx.AsyncClient() as client:
        return (await client.get(f"http://127.0.0.1:{port}/{path}", timeout=30)).status_code
