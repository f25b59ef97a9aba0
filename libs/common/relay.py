"""The outbox relay: publishes what units of work have committed, in order, until JetStream says it is stored."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import nats.errors
import nats.js.errors
from sqlalchemy import select, update

from libs.common.bus import Bus
from libs.common.clock import Clock, to_us, utc_now
from libs.common.errors import Unavailable
from libs.common.faults import crash_point
from libs.common.store import Store

BATCH = 100
IDLE_S = 2.0
BACK_OFF_S = 1.0
# Published rows are kept so that an unclean stop of NATS, which may forget its last seconds, can be made good.
KEEP_US = 3600 * 1_000_000

log = logging.getLogger(__name__)


class Relay:
    """Publishes one store's outbox. The only publisher of stored messages in a service."""

    def __init__(self, store: Store[Any], bus: Bus, clock: Clock = utc_now) -> None:
        self._store = store
        self._bus = bus
        self._clock = clock

    async def run(self) -> None:
        while True:
            self._store.outbox_filled.clear()
            try:
                published = await self.publish_batch()
            except (nats.errors.Error, nats.js.errors.Error, Unavailable, TimeoutError) as error:
                log.warning("outbox waits for the bus", extra={"reason": repr(error)})
                await asyncio.sleep(BACK_OFF_S)
                continue
            if published < BATCH:
                await self._wait_for_more()

    async def publish_batch(self) -> int:
        """Publishes up to BATCH waiting rows and returns how many; a crash in between repeats them by the same id."""
        outbox = self._store.skeleton.outbox
        waiting = select(outbox).where(outbox.c.published_us.is_(None)).order_by(outbox.c.id).limit(BATCH)
        async with self._store.view() as view:
            rows = (await view.execute(waiting)).all()
        if not rows:
            return 0
        publishing = (self._bus.publish_stored(r.stream, r.subject, json.loads(r.headers), r.body) for r in rows)
        await asyncio.gather(*publishing)
        crash_point(f"{self._store.source}.after_publish")
        async with self._store.begin() as unit:
            done = update(outbox).where(outbox.c.id.in_([row.id for row in rows]))
            await unit.execute(done.values(published_us=to_us(self._clock())))
        return len(rows)

    async def forget_old(self) -> None:
        """Drops rows published long ago."""
        outbox = self._store.skeleton.outbox
        async with self._store.begin() as unit:
            old = outbox.c.published_us < to_us(self._clock()) - KEEP_US
            await unit.execute(outbox.delete().where(old))

    async def _wait_for_more(self) -> None:
        try:
            await asyncio.wait_for(self._store.outbox_filled.wait(), IDLE_S)
        except TimeoutError:
            return
