"""An executor on an empty database, with a cluster in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from libs.common.store import Store
from services.executor.settings import ExecutorSettings
from services.executor.store import SKELETON, ExecutorUnit
from tests.support.databases import migrate_new
from tests.unit.executor.bench import Bench
from tests.unit.executor.fake_cluster import FakeCluster


@pytest.fixture
async def bench(database_url: str, tmp_path: Path) -> AsyncIterator[Bench]:
    store = Store(database_url, ExecutorUnit, SKELETON, "executor")
    await migrate_new(store, "executor")
    settings = ExecutorSettings(home=tmp_path, reconcile_s=0.0, keep_folder_s=0.0, node_fence_s=10.0, revisit_s=0.0)
    made = Bench(store, FakeCluster(), settings)
    await made.watcher.look()
    yield made
    await store.close()
