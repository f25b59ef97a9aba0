"""Keeps the skeleton's tables small: drops what no repeat can ask for any more."""

from __future__ import annotations

import asyncio
from typing import Any

from libs.common.clock import Clock, to_us, utc_now
from libs.common.store import Store

EVERY_S = 600.0
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
        old = (
            tables.outbox.delete().where(tables.outbox.c.published_us < now - OUTBOX_US),
            tables.inbox.delete().where(tables.inbox.c.applied_us < now - INBOX_US),
            tables.idempotency.delete().where(tables.idempotency.c.created_us < now - IDEMPOTENCY_US),
        )
        for statement in old:
            async with self._store.begin() as unit:
                await unit.execute(statement)
