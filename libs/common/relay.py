"""The outbox relay: publishes what units of work have committed, in order, until JetStream says it is stored.

What this process commits reaches the relay through memory, so that a message leaves at once; the table is read at
the start, after a failure, and now and then, for whatever memory does not have. Rows are marked as published a
little later and together: a crash in between publishes them again under the same id, which JetStream stores once.
A row that is committed just when the table is read may go twice, too, from there and from memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import Any

import nats.errors
import nats.js.errors
from sqlalchemy import func, select, update

from libs.common.bus import Bus
from libs.common.clock import Clock, to_us, utc_now
from libs.common.errors import Unavailable
from libs.common.faults import crash_point
from libs.common.store import Store
from libs.common.waiting import happens

BATCH = 100
# Rows that one transaction unmarks: others write in between.
ROWS = 1000
LOOK_S = 5.0
MARK_S = 0.2
BACK_OFF_S = 1.0
SECOND_US = 1_000_000
# How much NATS may have forgotten after an unclean stop: its sync interval of 2 minutes, and 5 more to be sure.
DISTRUST_US = 420 * SECOND_US

log = logging.getLogger(__name__)
_AWAY = (nats.errors.Error, nats.js.errors.Error, Unavailable, TimeoutError)


class Relay:
    """Publishes one store's outbox. The only publisher of stored messages in a service."""

    def __init__(self, store: Store[Any], bus: Bus, clock: Clock = utc_now) -> None:
        self._store = store
        self._bus = bus
        self._clock = clock
        self._unmarked: list[str] = []
        # When JetStream last said that it has a message; None until it did so to this process.
        self._stored_us: int | None = None
        self._distrust = True
        bus.on_disconnect(self._lose_trust)

    async def run(self) -> None:
        """Publishes until cancelled."""
        read_table = True
        while True:
            self._store.outbox_filled.clear()
            try:
                if self._distrust:
                    await self._unmark_recent()
                    read_table = True
                if read_table:
                    await self._publish_table()
                await self._publish_committed()
                read_table = not await self._wait_for_more()
            except _AWAY as error:
                # The bus is away, or the disk is full. What was taken from memory is still in the table.
                log.warning("outbox waits", extra={"reason": repr(error)})
                read_table = True
                await asyncio.sleep(BACK_OFF_S)

    async def _publish_table(self) -> None:
        await self.mark()
        while not self._distrust:
            # The table has it all; in a long outage, or behind many rows, memory would only grow.
            self._store.committed.clear()
            if not await self.publish_batch():
                return
            await self.mark()

    async def publish_batch(self) -> int:
        """Publishes up to BATCH rows that the table has as unpublished, and returns how many."""
        outbox = self._store.skeleton.outbox
        waiting = select(outbox).where(outbox.c.published_us.is_(None)).order_by(outbox.c.id).limit(BATCH)
        async with self._store.view() as view:
            rows = [dict(row) for row in (await view.execute(waiting)).mappings()]
        await self._publish(rows)
        return len(rows)

    async def _publish_committed(self) -> None:
        committed = self._store.committed
        while committed and not self._distrust:
            await self._publish([committed.popleft() for _ in range(min(BATCH, len(committed)))])

    async def _publish(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        outcomes = await asyncio.gather(*map(self._publish_row, rows), return_exceptions=True)
        crash_point(f"{self._store.source}.after_publish")
        stored = [row["id"] for row, failure in zip(rows, outcomes, strict=True) if failure is None]
        if stored:
            self._stored_us = to_us(self._clock())
        self._unmarked += stored
        for failure in outcomes:
            if failure is not None:
                raise failure

    async def _publish_row(self, row: dict[str, Any]) -> None:
        await self._bus.publish_stored(row["stream"], row["subject"], json.loads(row["headers"]), row["body"])

    async def mark(self) -> None:
        """Notes in the table what has been published."""
        while ids := self._unmarked[:BATCH]:
            await self._set_published(ids)
            del self._unmarked[: len(ids)]

    async def _set_published(self, ids: Iterable[str]) -> None:
        outbox = self._store.skeleton.outbox
        async with self._store.begin() as unit:
            done = update(outbox).where(outbox.c.id.in_(list(ids)))
            await unit.execute(done.values(published_us=to_us(self._clock())))

    async def _unmark_recent(self) -> None:
        """Publishes the last minutes again: a NATS that stopped uncleanly may have forgotten them.

        The last minutes in which it took something, that is: how long it was away since then does not matter.
        """
        # What was published and is not marked yet is as doubtful, and the table has it as unpublished.
        self._unmarked.clear()
        stored_us = self._stored_us
        if stored_us is None:
            newest = select(func.max(self._store.skeleton.outbox.c.published_us))
            async with self._store.view() as view:
                stored_us = (await view.execute(newest)).scalar() or 0
        while await self._unmark_oldest(stored_us - DISTRUST_US):
            pass
        # Nothing was published meanwhile, so a connection lost meanwhile has made nothing else doubtful.
        self._distrust = False

    async def _unmark_oldest(self, after_us: int) -> bool:
        """Unmarks the ROWS oldest, and those as old as the last of them; whether there may be more.

        The oldest first: who begins again in the middle finds the same newest, and so the same minutes.
        """
        outbox = self._store.skeleton.outbox
        moment = outbox.c.published_us
        recent = select(moment).where(moment > after_us).order_by(moment)
        async with self._store.begin() as unit:
            last_us = (await unit.execute(recent.offset(ROWS - 1).limit(1))).scalar()
            step = update(outbox).where(moment > after_us)
            step = step if last_us is None else step.where(moment <= last_us)
            await unit.execute(step.values(published_us=None))
        return last_us is not None

    async def _wait_for_more(self) -> bool:
        """Whether something was committed; False when it is time to look at the table."""
        marked = not self._unmarked
        more = await happens(self._store.outbox_filled, LOOK_S if marked else MARK_S)
        if marked and not more:
            return False
        if not more or len(self._unmarked) >= BATCH:
            await self.mark()
        return True

    def _lose_trust(self) -> None:
        self._distrust = True
        self._store.outbox_filled.set()
