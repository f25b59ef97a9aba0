"""Runs one service in this process until SIGTERM: the same way alone and under the launcher."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import signal
from typing import Any

import uvloop

from libs.common import telemetry
from libs.common.migrations import migrate
from libs.common.settings import Settings


def run(name: str) -> None:
    """Builds `services.<name>.app`, migrates its database, and serves until told to stop."""
    app = importlib.import_module(f"services.{name}.app")
    settings = Settings()
    traces = settings.home / "traces" if settings.traces else None
    telemetry.set_up(name, log_level=settings.log_level, traces_folder=traces)
    uvloop.run(_serve(app.build()))


async def _serve(service: Any) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    store = getattr(service, "store", None)
    if store is not None:
        await migrate(store.writer, service.name)
    async with service.running():
        await stop.wait()
