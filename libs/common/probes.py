"""The small HTTP side of every service: /metrics for Prometheus, /livez and /readyz for whoever supervises it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from libs.common.settings import Settings


class Probes:
    """Serves until stopped; the address is written to `home/run/<service>.json`, as the port may be picked freely."""

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
        self._server = uvicorn.Server(config)
        config.load()
        self._socket = config.bind_socket()
        self._server.lifespan = config.lifespan_class(config)
        await self._server.startup(sockets=[self._socket])
        self._write_address()

    async def stop(self) -> None:
        if self._server:
            with contextlib.suppress(OSError):
                await self._server.shutdown(sockets=[self._socket])

    def _write_address(self) -> None:
        folder = self._settings.home / "run"
        folder.mkdir(parents=True, exist_ok=True)
        host, port = self._socket.getsockname()[:2]
        address = {"service": self._service, "pid": os.getpid(), "metrics": f"http://{host}:{port}/metrics"}
        (folder / f"{self._service}.json").write_text(json.dumps(address))

    async def _live(self, _request: Request) -> Response:
        return JSONResponse({"service": self._service})

    async def _readiness(self, _request: Request) -> Response:
        ready = self._ready()
        return JSONResponse({"service": self._service, "ready": ready}, status_code=200 if ready else 503)


async def _metrics(_request: Request) -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
