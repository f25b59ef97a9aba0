"""The small HTTP side of every service: /metrics for Prometheus, /livez and /readyz for whoever supervises it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from libs.common.settings import Settings

log = logging.getLogger(__name__)


class Probes:
    """Serves until stopped; `tell_address` writes where to `home/run/<service>.json`, as the port may be picked freely.

    Two steps, because a process that only waits for another's place must not send people to itself.
    """

    def __init__(self, service: str, settings: Settings, ready: Callable[[], bool]) -> None:
        self._service = service
        self._settings = settings
        self._ready = ready
        self._server: uvicorn.Server | None = None
        self._socket: Any = None

    async def start(self) -> None:
        routes = [Route("/metrics", _metrics), Route("/livez", self._live), Route("/readyz", self._readiness)]
        config = uvicorn.Config(
            Starlette(routes=routes),
            host=self._settings.metrics_host,
            port=self._settings.metrics_port,
            log_config=None,
            lifespan="off",
            access_log=False,
        )
        server = uvicorn.Server(config)
        config.load()
        self._socket = config.bind_socket()
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[self._socket])
        self._server = server

    async def stop(self) -> None:
        if self._server:
            with contextlib.suppress(OSError):
                await self._server.shutdown(sockets=[self._socket])

    def tell_address(self) -> None:
        folder = self._settings.home / "run"
        folder.mkdir(parents=True, exist_ok=True)
        host, port = self._socket.getsockname()[:2]
        address = {"service": self._service, "pid": os.getpid(), "metrics": f"http://{host}:{port}/metrics"}
        try:
            write_whole(folder / f"{self._service}.json", json.dumps(address))
        except OSError as error:
            log.warning("nobody can be told where this listens", extra={"reason": repr(error)})

    async def _live(self, _request: Request) -> Response:
        return JSONResponse({"service": self._service})

    async def _readiness(self, _request: Request) -> Response:
        ready = self._ready()
        return JSONResponse({"service": self._service, "ready": ready}, status_code=200 if ready else 503)


def write_whole(path: Path, text: str) -> None:
    """In one step for whoever reads it: they find all of the old or all of the new, or on a full disk neither.

    Raises:
        OSError: there was no room, not even that of the old, which no longer holds and is gone.
    """
    fresh = path.with_suffix(f".{os.getpid()}.new")
    try:
        try:
            fresh.write_text(text)
        except OSError:
            path.unlink(missing_ok=True)
            fresh.write_text(text)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


async def _metrics(_request: Request) -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
