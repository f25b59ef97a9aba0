"""Live tails: lines are repeated on core NATS once they are committed, in the order in which they were."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import nats.errors

from libs.common.contracts.subjects import tail_subject
from libs.common.errors import Unavailable
from libs.common.store import UnitOfWork

# Hints wait here while the bus is slow; what does not fit is left to the followers' own reading.
WAITING = 10_000

log = logging.getLogger(__name__)


class Tail:
    """Collects pages inside of transactions and sends those whose transaction committed.

    Nothing is promised to a follower but order: a page that was lost shows as a gap in the sequence, and what is
    missing is read with GetLog.
    """

    def __init__(self, send: Callable[[str, bytes], Awaitable[None]]) -> None:
        self._send = send
        self._unit: UnitOfWork | None = None
        self._collected: list[tuple[str, bytes]] = []
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(WAITING)

    def collect(self, unit: UnitOfWork, team_id: str, job_id: str, page: bytes) -> None:
        """Keeps a page until `unit` commits. A new unit of work means that an earlier one did not."""
        if unit is not self._unit:
            self._unit, self._collected = unit, []
        self._collected.append((tail_subject(team_id, job_id), page))

    def committed(self) -> None:
        """Called after each commit of the inbox, which runs one unit of work at a time."""
        collected, self._unit, self._collected = self._collected, None, []
        for item in collected:
            if self._queue.full():
                self._queue.get_nowait()
            self._queue.put_nowait(item)

    async def run(self) -> None:
        while True:
            subject, page = await self._queue.get()
            try:
                await self._send(subject, page)
            except (nats.errors.Error, Unavailable, OSError) as error:
                log.debug("a live page was not sent", extra={"reason": repr(error)})
