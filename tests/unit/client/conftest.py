"""Every client test has folders of its own for configuration and cache, and no server from the surroundings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nabla.client import Client

from .stub import StubServer, running

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "URL", "TOKEN", "API_URL", "HOME", "JOB_ID", "PROJECT_ID", "WORKSPACE", "ARTIFACTS", "STORAGE", "ATTEMPT",
    ):  # fmt: skip
        monkeypatch.delenv(f"NABLA_{name}", raising=False)
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NABLA_CONFIG", str(tmp_path / "config" / "config.json"))
    monkeypatch.setenv("NABLA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def stub() -> Iterator[StubServer]:
    yield from running()


@pytest.fixture
def client(stub: StubServer) -> Iterator[Client]:
    """A client of the stub that does not really wait between attempts."""
    with Client(stub.url, "secret-token", sleep=lambda seconds: None) as client:
        yield client
