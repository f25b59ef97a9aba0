"""Tells the cluster's autoscaler what queued work waits for, and takes it back when nothing does."""

from __future__ import annotations

import asyncio
import logging

from sqlalchemy.exc import DBAPIError

from libs.common.clock import to_us, utc_now
from libs.common.waiting import happens
from services.executor.domain.demand import Asked, bundles_for, held_by
from services.executor.domain.inventory import GONE
from services.executor.loops.endings import ExecutorStore
from services.executor.ports import Cluster, ClusterAway
from services.executor.settings import ExecutorSettings
from services.executor.store import known_node

# Asked anew so often even unchanged: a new head has forgotten it.
ASK_AGAIN_S = 30.0
PAUSE_S = 2.0

log = logging.getLogger(__name__)


class Scaler:
    """The only one that asks the autoscaler, as each asking replaces the one before."""

    def __init__(self, store: ExecutorStore, cluster: Cluster, settings: ExecutorSettings) -> None:
        self._store = store
        self._cluster = cluster
        self._settings = settings
        self._woken = asyncio.Event()
        self._asked: Asked | None = None
        self._asked_s = 0.0

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self.look()
            except (ClusterAway, TimeoutError, DBAPIError) as error:
                log.info("the autoscaler is not asked yet", extra={"reason": str(error)})
            await happens(self._woken, PAUSE_S)

    async def look(self) -> None:
        """One pass. Where no autoscaler is to be asked, nobody else's demand is touched."""
        if not self._settings.autoscale_limit:
            return
        async with self._store.view() as view:
            demands, nodes = await view.demand(to_us(utc_now())), await view.nodes()
        present = [held_by(known_node(row, 0.0)) for row in nodes if row.state != GONE]
        asked = bundles_for(demands, present, self._settings.autoscale_limit)
        now_s = asyncio.get_running_loop().time()
        if asked == self._asked and now_s - self._asked_s < ASK_AGAIN_S:
            return
        await self._cluster.ask_for(asked.bundles)
        if asked != self._asked:
            log.info("asked the autoscaler", extra={"bundles": len(asked.bundles), "left_out": asked.left_out})
        self._asked, self._asked_s = asked, now_s
