from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.integration.common.ledger import LedgerStore, Time, opened
from tests.support.disks import small_disk_at


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
async def store(database_url: str, clock: Time) -> AsyncIterator[LedgerStore]:
    """The ledger, on SQLite and on PostgreSQL."""
    async with opened(database_url, clock) as store:
        yield store


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """Not in pytest's own folder, which is closed to the user that PostgreSQL runs as."""
    with tempfile.TemporaryDirectory(prefix="nabla-disk-") as folder:
        Path(folder).chmod(0o755)
        with small_disk_at(Path(folder) / "disk", 32) as disk:
            yield disk
