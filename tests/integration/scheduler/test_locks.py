"""One scheduler per database, and tables that are what the code says."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from libs.common.locks import AlreadyHeld, SoleWriter
from libs.common.store import async_url
from services.scheduler.store import Base
from tests.unit.scheduler.world import World

pytestmark = pytest.mark.integration


async def test_a_second_writer_is_turned_away_until_the_first_is_gone(database_url):
    url = async_url(database_url)
    first, second = SoleWriter(url, "scheduler"), SoleWriter(url, "scheduler")
    holding = asyncio.create_task(first.run())
    await asyncio.wait_for(first.held.wait(), 60)
    with pytest.raises(AlreadyHeld, match="Another process runs scheduler"):
        await second.run()
    holding.cancel()
    with suppress(asyncio.CancelledError):
        await holding
    again = asyncio.create_task(second.run())
    await asyncio.wait_for(second.held.wait(), 60)
    again.cancel()
    with suppress(asyncio.CancelledError):
        await again


async def test_the_migrations_make_the_tables_of_the_code(world: World):
    def differences(connection: Connection) -> list[object]:
        found = compare_metadata(MigrationContext.configure(connection), Base.metadata)
        return [item for item in found if "alembic_version" not in str(item)]

    async with world.store.writer.connect() as connection:
        assert await connection.run_sync(differences) == []
