"""Fixtures for all suites: real servers, free ports, everything cleaned up."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.databases import HINT, new_database, postgres_binaries, running_postgres
from tests.support.distribution import PlatformScheduling

# How long an example takes is the machine's affair: on a busy one Hypothesis would call a test that passes a failure.
settings.register_profile("nabla", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nabla")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server of this test session.

    Not in pytest's own folder, which another session closes to the user that PostgreSQL runs as.
    """
    if postgres_binaries() is None:
        pytest.skip(f"PostgreSQL is not installed: {HINT}")
    with tempfile.TemporaryDirectory(prefix="nabla-postgres-") as folder, running_postgres(Path(folder)) as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, once on SQLite and once on PostgreSQL: what store suites run on."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    return new_database(request.getfixturevalue("postgres_url"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> PlatformScheduling:
    return PlatformScheduling(config, log)
