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
    """Watches the running loop, and whether `connected` stays false for too long."""

    def __init__(self, connected: Callable[[], bool]) -> None:
        self._connected = connected
        self._beat = time.monotonic()
        self._seen_connected = time.monotonic()
        self._stopped = threading.Event()

    async def run(self) -> None:
        """Beats until cancelled."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            while True:
                self._beat = time.monotonic()
                if self._connected():
                    self._seen_connected = self._beat
                await asyncio.sleep(1)
        finally:
            self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(1):
            now = time.monotonic()
            if now - self._beat > LOOP_LAG_S:
                self._end("the event loop has not run for 30 s")
            if now - self._seen_connected > DISCONNECTED_S:
                self._end("no connection to NATS for 60 s")

    @staticmethod
    def _end(reason: str) -> None:
        log.critical("ending this process: %s", reason)
        os._exit(EXIT_CODE)
