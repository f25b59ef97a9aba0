"""The registry over real databases: each suite once on SQLite and once on PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.databases import new_database
from tests.unit.registry.harness import Catalogue, running_catalogue


@pytest.fixture
def runs_url(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> str:
    """A second empty database beside `database_url`, of the same kind."""
    if database_url.startswith("sqlite"):
        return f"sqlite:///{tmp_path}/runs.db"
    return new_database(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def catalogue(database_url: str, runs_url: str, tmp_path: Path) -> AsyncIterator[Catalogue]:
    async with running_catalogue(database_url, runs_url, tmp_path / "secrets.keys") as catalogue:
        yield catalogue


@pytest.fixture
async def rival(catalogue: Catalogue, database_url: str, runs_url: str, tmp_path: Path) -> AsyncIterator[Catalogue]:
    """A second writer over the same databases."""
    async with running_catalogue(database_url, runs_url, tmp_path / "secrets.keys") as rival:
        yield rival
