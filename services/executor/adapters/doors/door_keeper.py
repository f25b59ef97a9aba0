"""Keeps a node's door: its address stays the same, and whoever knocks first has the process behind it started.

On the front door's own machine it listens on loopback, and is all there is. On any other it does so too, and in front
of it, on the machine's own address, TLS lets the front door alone in: to it, and to what jobs have opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import time
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from services.executor.adapters.attempts.job_spec import door_of
from services.executor.adapters.doors import terminator
from services.executor.adapters.doors.authority import DoorAuthority
from services.executor.adapters.doors.door import Config, start_door
from services.executor.adapters.doors.terminator import start_terminator
from services.executor.domain.doors import name_of_port

PAUSE_S = 1.0
PORT_PATIENCE_S = 3.0

log = logging.getLogger(__name__)


class Keeper:
    """A listener, and the process behind it once somebody has knocked."""

    def __init__(
        self, name: str, listener: socket.socket, start: Callable[[socket.socket], subprocess.Popen[bytes]]
    ) -> None:
        self._name, self._listener, self._start = name, listener, start
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    async def watch(self) -> None:
        """Starts it for the first who knocks, and another one should it die. Connections outlive both."""
        loop = asyncio.get_running_loop()
        while True:
            await _knock(loop, self._listener)
            self._process = await asyncio.to_thread(self._start, self._listener)
            code = await asyncio.to_thread(self._process.wait)
            log.warning("%s ended; the next who knocks has it started again", self._name, extra={"code": code})
            await asyncio.sleep(PAUSE_S)

    def close(self) -> None:
        self._listener.close()
        if self._process:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)


class DoorKeeper:
    """The door of this agent's node.

    Args:
        host: this machine's address by which the front door reaches it.
        key: under which tickets are issued, and certificates.
        node_dir: the node's folder.
    """

    def __init__(self, host: str, key: bytes, node_id: str, node_dir: Path) -> None:
        self._node_id = node_id
        attempts = node_dir / "attempts"
        door = socket.create_server(("127.0.0.1", 0), backlog=128)
        config = Config(key, attempts, node_dir / "tickets-used")
        self._keepers = [Keeper("the door", door, partial(start_door, config=config))]
        self._is_far = not ip_address(host).is_loopback
        if self._is_far:
            authority = DoorAuthority(key)
            told = terminator.Config(
                node_id, *authority.of_node(node_id), authority.certificate, str(attempts), self._keepers[0].address[1]
            )
            listener = _same_listener(host, node_dir / "door-port")
            self._keepers.append(Keeper("TLS", listener, partial(start_terminator, config=told)))

    @property
    def address(self) -> str:
        host, port = self._keepers[-1].address
        return f"{host}:{port}"

    def address_of(self, execution_id: str, port: int, host_port: int) -> str:
        """Where the front door finds a port that a job has opened.

        Args:
            host_port: the port of this machine's loopback that leads to it.
        """
        return name_of_port(self._node_id, execution_id, port) if self._is_far else f"127.0.0.1:{host_port}"

    async def watch(self) -> None:
        await asyncio.gather(*(keeper.watch() for keeper in self._keepers))

    def close(self) -> None:
        for keeper in self._keepers:
            keeper.close()


def _same_listener(host: str, memory: Path) -> socket.socket:
    """On the port of the agent before this one: routes to this node stay good. That one may be leaving just now."""
    with contextlib.suppress(OSError, ValueError):
        port, deadline = int(memory.read_text()), time.monotonic() + PORT_PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                return socket.create_server((host, port), backlog=128)
            time.sleep(0.1)
    listener = socket.create_server((host, 0), backlog=128)
    memory.write_text(str(listener.getsockname()[1]))
    return listener


def address_here(_execution_id: str, _port: int, host_port: int) -> str:
    """Of a job's port, where the node has no door."""
    return f"127.0.0.1:{host_port}"


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
