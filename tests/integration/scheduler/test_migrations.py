"""Tables that are what the code says."""

from __future__ import annotations

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from services.scheduler.store import Base
from tests.unit.scheduler.world import World

pytestmark = pytest.mark.integration


async def test_the_migrations_make_the_tables_of_the_code(world: World):
    def differences(connection: Connection) -> list[object]:
        found = compare_metadata(MigrationContext.configure(connection), Base.metadata)
        return [item for item in found if "alembic_version" not in str(item)]

    async with world.store.writer.connect() as connection:
        assert await connection.run_sync(differences) == []
