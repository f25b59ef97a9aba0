"""Runs one service in this process until SIGTERM: the same way alone and under the launcher."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import signal
from typing import Any

import uvloop

from libs.common import telemetry
from libs.common.locks import AlreadyHeld
from libs.common.settings import Settings

log = logging.getLogger(__name__)


def run(name: str) -> None:
    """Builds `services.<name>.app` and serves until told to stop."""
    app = importlib.import_module(f"services.{name}.app")
    settings = Settings()
    traces = settings.home / "traces" if settings.traces else None
    telemetry.set_up(name, log_level=settings.log_level, traces_folder=traces)
    uvloop.run(_serve(app.build()))


async def _serve(service: Any) -> None:
    """Stops in order when told to, also while it still waits for its databases.

    Raises:
        SystemExit: another process has them; the log says which.
    """
    stop, running = asyncio.Event(), False
    loop, this = asyncio.get_running_loop(), asyncio.current_task()

    def told() -> None:
        if not stop.is_set() and not running and this:
            this.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, told)
    try:
        async with service.running():
            running = True
            await stop.wait()
    except AlreadyHeld as error:
        log.critical(str(error))
        raise SystemExit(1) from None
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
