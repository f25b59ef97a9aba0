"""What the executor asks others, under its own rights on a real NATS."""

import pytest

from services.executor.adapters.workspaces.storage import BusLogs
from tests.integration.executor.world import TEAM, Neighbours
from tests.support.nats import NatsServer

pytestmark = pytest.mark.integration


async def test_storage_is_asked_whether_a_log_is_sealed(nats_server: NatsServer, neighbours: Neighbours) -> None:
    neighbours.sealed_logs.add("js1")
    bus = nats_server.bus("executor")
    await bus.start()
    logs = BusLogs(bus)
    assert [await logs.is_sealed(TEAM, job_id) for job_id in ("js1", "js2")] == [True, False]
    await bus.stop()
