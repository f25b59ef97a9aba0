"""Tells the executors what waits for machines that are not there, so that an autoscaler can be asked for them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

from sqlalchemy.exc import DBAPIError

from libs.common.contracts.messages import Demand, DemandChanged, Resources
from services.scheduler.domain.shapes import Shape
from services.scheduler.store import SchedulerStore

LOOK_S = 2.0
# The executor withdraws what it does not hear again.
REPEAT_S = 20.0
PLATFORM_TEAM = "platform"

log = logging.getLogger(__name__)


class DemandTeller:
    """One event whenever the unmet demand changes, repeated while there is any."""

    def __init__(self, store: SchedulerStore) -> None:
        self._store = store
        self._told: tuple[Demand, ...] = ()
        self._told_s = float("-inf")

    async def run(self) -> None:
        while True:
            try:
                await self.look(time.monotonic())
            except DBAPIError as error:
                log.warning("demand is not told yet", extra={"reason": repr(error)})
            await asyncio.sleep(LOOK_S)

    async def look(self, now_s: float) -> None:
        counts: Counter[Shape] = Counter()
        for parts, jobs in self._store.policy.unmet().items():
            for shape in parts:
                counts[shape] += jobs
        demands = tuple(Demand(resources=_resources(shape), count=count) for shape, count in sorted(counts.items()))
        if demands == self._told and not (demands and now_s - self._told_s >= REPEAT_S):
            return
        event = DemandChanged(demands=demands)
        await self._store.run(lambda unit: unit.emit(event, team_id=PLATFORM_TEAM, object_id="demand"))
        self._told, self._told_s = demands, now_s


def _resources(shape: Shape) -> Resources:
    return Resources(
        cpu_count=shape.milli_cpus / 1000,
        memory_bytes=shape.memory_bytes,
        gpu_count=shape.milli_gpus / 1000,
        gpu_model=shape.gpu_model,
        gpu_memory_bytes=shape.gpu_memory_bytes,
    )
