"""Makes what the cluster holds equal to what executions need, whatever was lost in between."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from services.executor.domain.execution import ENDED, FINISHING, RUNNING, STARTING, amounts_for
from services.executor.loops.endings import ExecutorStore
from services.executor.ports import Cluster, ClusterAway, NodeAway, NoRoom, Reservation
from services.executor.store import PAGE, ExecutionRow

SWEEP_S = 30.0

log = logging.getLogger(__name__)


class Sweeper:
    """Releases what ended executions still hold, and reserves again for running ones that a new head forgot."""

    def __init__(self, store: ExecutorStore, cluster: Cluster) -> None:
        self._store = store
        self._cluster = cluster

    async def run(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            with contextlib.suppress(ClusterAway, TimeoutError):
                await self.sweep()

    async def sweep(self) -> None:
        """One pass. Reservations with names unknown here belong to others."""
        reserved = await self._cluster.reserved()
        async with self._store.view() as view:
            holders = await view.executions(reserved)
            started = [each for each, _, state in await view.unfinished() if state in (STARTING, RUNNING, FINISHING)]
            forgotten = await view.executions([each for each in started if each not in reserved][:PAGE])
        for row in holders:
            if row.state == ENDED:
                await self._cluster.release(row.id)
        for row in forgotten:
            await self._reserve_again(row)

    async def _reserve_again(self, row: ExecutionRow) -> None:
        amounts = amounts_for(row.read_template().resources)
        try:
            gpus = await self._cluster.reserve(Reservation(row.id, row.node_id, amounts))
        except (NodeAway, NoRoom) as error:
            log.warning("a running attempt has no reservation", extra={"attempt_id": row.id, "reason": str(error)})
            return
        if list(gpus) != row.gpu_indices:
            log.warning("Ray counts other GPUs than the attempt uses", extra={"attempt_id": row.id})
