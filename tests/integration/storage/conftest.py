"""The storage service with real NATS and a real S3, as `nabla up` runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.local.credentials import nats_public_key
from infra.local.nats import Grant, grant_for, storage_extra
from libs.common.bus import Bus
from libs.common.service import Service
from services.storage.app import build
from services.storage.settings import StorageSettings
from tests.support.nats import NatsServer, running_nats
from tests.support.seaweed import Seaweed, running_seaweed

# Stands for the gateway, the scheduler and the node agents at once.
WORLD = Grant("world", publish=("nabla.>", "$JS.API.>"), subscribe=("_INBOX_world.>", "nabla.>"))


@dataclass
class Running:
    service: Service
    asker: Bus


class Installation:
    """Servers that outlive the service, which tests start and stop at will."""

    def __init__(self, folder: Path, nats: NatsServer, seaweed: Seaweed) -> None:
        self.nats = nats
        self.seaweed = seaweed
        self.settings = StorageSettings(
            home=folder,
            nats_url=nats.url,
            nats_keys=nats.folder / "keys",
            s3_address=seaweed.address,
            s3_keys=seaweed.keys_file,
            s3_bucket=f"nabla-{folder.name}".replace("_", "-").lower()[:60].strip("-"),
            front_door=f"http://{seaweed.address}",
            reconcile_s=0.3,
            gap_patience_s=1.0,
            last_frame_patience_s=3.0,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Running]:
        service = build(self.settings)
        await self.nats.provision(service.routes)
        asker = self.nats.bus("world")
        async with service.running():
            await asker.start()
            try:
                yield Running(service, asker)
            finally:
                await asker.stop()


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with running_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def installation(tmp_path: Path, seaweed: Seaweed) -> Iterator[Installation]:
    routes = build(StorageSettings(home=tmp_path, nats_keys=_placeholder(tmp_path))).routes
    with running_nats(tmp_path / "nats", [grant_for(routes), storage_extra(), WORLD]) as nats:
        yield Installation(tmp_path, nats, seaweed)


def _placeholder(folder: Path) -> Path:
    keys = folder / "placeholder"
    nats_public_key(keys, "storage")
    return keys
