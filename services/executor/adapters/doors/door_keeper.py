"""Keeps a node's door: its address stays the same, and whoever knocks first has the process behind it started."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
from pathlib import Path

from services.executor.adapters.attempts.job_spec import door_of
from services.executor.adapters.doors.door import Config, start_door

PAUSE_S = 1.0

log = logging.getLogger(__name__)


class DoorKeeper:
    """The door of this agent's node.

    Args:
        host: the address to listen on: the one by which the front door reaches this node.
        key: under which tickets are issued.
        node_dir: the node's folder.
    """

    def __init__(self, host: str, key: bytes, node_dir: Path) -> None:
        self._listener = socket.create_server((host, 0), backlog=128)
        self._config = Config(key, node_dir / "attempts", node_dir / "tickets-used")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    async def watch(self) -> None:
        """Starts the door for the first who knocks, and another one should it die. Sessions outlive both."""
        loop = asyncio.get_running_loop()
        while True:
            await _knock(loop, self._listener)
            self._process = await asyncio.to_thread(start_door, self._listener, self._config)
            code = await asyncio.to_thread(self._process.wait)
            log.warning("the door ended; the next who knocks has it started again", extra={"code": code})
            await asyncio.sleep(PAUSE_S)

    def close(self) -> None:
        self._listener.close()
        if self._process:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)


def address_towards(front_door: str) -> str:
    """This machine's own address on the way to the front door: loopback where both are one machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        probe.connect(door_of(front_door))
        return str(probe.getsockname()[0])


async def _knock(loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
    knocked = asyncio.Event()
    loop.add_reader(listener, knocked.set)
    try:
        await knocked.wait()
    finally:
        loop.remove_reader(listener)
