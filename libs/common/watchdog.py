"""Ends a process that looks alive and is not, so that its supervisor starts it again.

A thread, because what it watches for (a loop that never yields, a NATS client wedged in its reconnect) stops
every task of the loop; both were measured.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable

LOOP_LAG_S = 30.0
DISCONNECTED_S = 60.0
EXIT_CODE = 70

log = logging.getLogger(__name__)


class Watchdog:
    """Watches the running loop, and whether `connected` stays false for too long.

    Args:
        lag_s: how long the loop may go without a turn.
        away_s: how long NATS may be away.
        look_s: the pause between two looks.
        now: seconds that only grow.
    """

    def __init__(
        self,
        connected: Callable[[], bool],
        *,
        lag_s: float = LOOP_LAG_S,
        away_s: float = DISCONNECTED_S,
        look_s: float = 1.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connected = connected
        self._lag_s = lag_s
        self._away_s = away_s
        self._look_s = look_s
        self._now = now
        self._beat = now()
        self._seen_connected = now()
        self._stopped = threading.Event()

    async def run(self) -> None:
        """Beats until cancelled."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            while True:
                self._beat = self._now()
                if self._connected():
                    self._seen_connected = self._beat
                await asyncio.sleep(self._look_s)
        finally:
            self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self._look_s):
            now = self._now()
            if now - self._beat > self._lag_s:
                self._end(f"the event loop has not run for {self._lag_s:g} s")
            if now - self._seen_connected > self._away_s:
                self._end(f"no connection to NATS for {self._away_s:g} s")

    @staticmethod
    def _end(reason: str) -> None:
        log.critical("ending this process: %s", reason)
        os._exit(EXIT_CODE)
