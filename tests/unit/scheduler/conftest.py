from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.scheduler.world import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    opened = await World(f"sqlite:///{tmp_path}/scheduler.db").open()
    yield opened
    await opened.close()
