"""A real NATS with the platform's own rights, the executor's neighbours, and node folders on a real disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.executor.routes import routes
from tests.integration.executor.world import Neighbours, ObjectStore, grants, meet_neighbours
from tests.support.leftovers import take_walls_down
from tests.support.nats import NatsServer, running_nats


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    with running_nats(tmp_path / "nats", grants()) as server:
        yield server


@pytest.fixture
def objects() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.close()


@pytest.fixture
async def neighbours(nats_server: NatsServer, objects: ObjectStore) -> AsyncIterator[Neighbours]:
    await nats_server.provision(routes())
    met = await meet_neighbours(nats_server, objects)
    yield met
    await met.client.close()


@pytest.fixture
def node_dir() -> Iterator[Path]:
    """Short, as it holds a Unix socket; on the disk that the platform uses, not in pytest's deep folders."""
    folder = Path(tempfile.mkdtemp(prefix="nabla-node-"))
    yield folder
    take_walls_down(folder)  # of agents that left while their jobs went on
    shutil.rmtree(folder, ignore_errors=True)
