"""Fixtures of the registry's suites."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from libs.common.contracts import messages as m
from tests.unit.registry.harness import Catalogue, running_catalogue


@pytest.fixture
async def catalogue(tmp_path: Path) -> AsyncIterator[Catalogue]:
    urls = (f"sqlite:///{tmp_path}/registry.db", f"sqlite:///{tmp_path}/registry_runs.db")
    async with running_catalogue(*urls, tmp_path / "secrets.keys") as catalogue:
        yield catalogue


@pytest.fixture
async def owner(catalogue: Catalogue) -> m.Principal:
    return await catalogue.member("main", "owner")


@pytest.fixture
async def member(catalogue: Catalogue, owner: m.Principal) -> m.Principal:
    return await catalogue.member("main", "member")


@pytest.fixture
async def stranger(catalogue: Catalogue) -> m.Principal:
    """The owner of another team."""
    return await catalogue.member("elsewhere", "owner")


@pytest.fixture
async def project(catalogue: Catalogue, owner: m.Principal) -> m.Project:
    return await catalogue.ask(m.CreateProject(name="digits"), owner, m.Project)
