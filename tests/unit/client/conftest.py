"""Every client test has folders of its own for configuration and cache, and no server from the surroundings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from nabla.cli import root
from nabla.cli.failures import guarded
from nabla.client import Client

from .stub import StubServer, running


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


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> object:
        return json.loads(self.out)


Nabla = Callable[..., Outcome]


@pytest.fixture
def nabla(capfd: pytest.CaptureFixture[str]) -> Nabla:
    def invoke(*arguments: str) -> Outcome:
        code = guarded(lambda: root.main(list(arguments), prog_name="nabla", standalone_mode=False))
        return Outcome(code, *capfd.readouterr())

    return invoke


@pytest.fixture
def server(stub: StubServer, monkeypatch: pytest.MonkeyPatch) -> StubServer:
    monkeypatch.setenv("NABLA_URL", stub.url)
    monkeypatch.setenv("NABLA_TOKEN", "t")
    return stub


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "My Digits"
    path.mkdir()
    (path / "train.py").write_text("print(1)")
    (path / ".env").write_text("SECRET=1")
    monkeypatch.chdir(path)
    return path
