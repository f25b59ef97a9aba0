"""uvicorn inside a process that somebody else runs: no signal handlers, and stopped by asking."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from services.gateway.settings import GatewaySettings

# Longer than a proxy keeps idle connections (Traefik: 90 s): else it would send a request into a closing one.
KEEP_ALIVE_S = 120
STOP_S = 5
# How long a client may leave what was sent to it unread. Closing a connection waits until all is read, so without this
# whoever never reads would hold a connection, and what is in its buffer, for as long as it likes.
UNREAD_S = 60


class _Embedded(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class WebServer:
    def __init__(self, app: FastAPI, settings: GatewaySettings) -> None:
        self._config = uvicorn.Config(
            app,
            host=settings.http_host,
            port=settings.http_port,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=True,
            forwarded_allow_ips=settings.trusted_proxies,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_S,
        )
        self._server = _Embedded(self._config)
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """`http://host:port`, once started."""
        assert self._socket is not None
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def connection_count(self) -> int:
        return len(self._server.server_state.connections)

    async def start(self) -> None:
        """Returns when it answers.

        Raises:
            OSError: the port is taken.
        """
        self._socket = bound(self._config.host, self._config.port)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")
        while not self._server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task:
            await asyncio.gather(self._task, return_exceptions=True)


def bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family=family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Linux only; connections inherit it.
    if user_timeout := getattr(socket, "TCP_USER_TIMEOUT", None):
        listener.setsockopt(socket.IPPROTO_TCP, user_timeout, UNREAD_S * 1000)
    listener.bind((host, port))
    listener.setblocking(False)
    return listener
