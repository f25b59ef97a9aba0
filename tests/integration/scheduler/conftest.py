from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.unit.scheduler.world import World


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    """On SQLite and on PostgreSQL."""
    opened = await World(database_url).open()
    yield opened
    await opened.close()
