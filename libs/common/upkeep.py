"""Keeps the skeleton's tables small: drops what no repeat can ask for any more."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import Column, delete, select

from libs.common.clock import Clock, to_us, utc_now
from libs.common.store import Store

EVERY_S = 600.0
# Rows a transaction: others write in between.
ROWS = 1000
DAY_US = 86_400 * 1_000_000
# Published rows are needed again only after an unclean stop of NATS.
OUTBOX_US = DAY_US // 24
# Events live for 14 days in their stream, and a restored backup may replay them all.
INBOX_US = 44 * DAY_US
IDEMPOTENCY_US = 7 * DAY_US


class Upkeep:
    """Visits one store's skeleton every ten minutes."""

    def __init__(self, store: Store[Any], clock: Clock = utc_now) -> None:
        self._store = store
        self._clock = clock

    async def run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            await self.forget_old()

    async def forget_old(self) -> None:
        now, tables = to_us(self._clock()), self._store.skeleton
        kept_for = (
            (tables.outbox.c.published_us, OUTBOX_US),
            (tables.inbox.c.applied_us, INBOX_US),
            (tables.idempotency.c.created_us, IDEMPOTENCY_US),
        )
        for moment, age_us in kept_for:
            while await self._forget_oldest(moment, now - age_us):
                pass

    async def _forget_oldest(self, moment: Column[Any], before_us: int) -> bool:
        """Drops the ROWS oldest, and those as old as the last of them; whether there may be more."""
        old = select(moment).where(moment < before_us).order_by(moment)
        async with self._store.begin() as unit:
            last_us = (await unit.execute(old.offset(ROWS - 1).limit(1))).scalar()
            upto_us = before_us - 1 if last_us is None else last_us
            await unit.execute(delete(moment.table).where(moment <= upto_us))
        return last_us is not None
