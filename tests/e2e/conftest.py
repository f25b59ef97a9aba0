"""One platform for all end-to-end tests: real NATS, S3, Ray, Traefik, BentoML and the six services."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local import demo
from nabla import Client
from nabla.objects import Deployment
from tests.support.platform import Platform, running_platform


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    # Test servers are here, so its own loopback is a place that workspaces may come from.
    settings = {"gpus": "2", "source_hosts": '["127.0.0.1"]', "workspace_bytes": "50000000"}
    with running_platform(tmp_path_factory.mktemp("platform") / "home", **settings) as platform:
        yield platform


@pytest.fixture(scope="session")
def digits(platform: Platform) -> Deployment:
    """The demo's way, walked once: examples/digits trained, registered, deployed, and ready."""
    with platform.client() as client:
        return demo.deploy(client, demo.registered_model(client, demo.train(client)))


@pytest.fixture
def client(platform: Platform) -> Iterator[Client]:
    with platform.client() as client:
        yield client


@pytest.fixture
def project(client: Client) -> str:
    """The id of a project that all tests may use."""
    found, _ = client.projects.ensure("end-to-end")
    return found.id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder to run from, named like a project."""
    made = tmp_path / "my-folder"
    made.mkdir()
    return made
