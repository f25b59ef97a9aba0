"""Networks that stand ready before an attempt asks for one: making one takes longer than all else of its walls.

The zygote keeps them, as nothing but descriptors. So they go with it, however it ends, and there is nothing that
another process would have to remove; and a shim that is forked from it has its network from its first moment. Each is
used by one attempt at most: what is taken never comes back.

They are made one after the other by processes with the lowest priority, when no attempt has been started for a moment.
While none is ready, an attempt makes its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from services.executor.adapters.attempts import kernel
from services.executor.adapters.attempts.forward import Port, keep_only, listen_inside
from services.executor.adapters.networks import network_names
from services.executor.adapters.networks.network import ReadyNetwork, make
from services.executor.adapters.networks.network_host import own_addresses
from services.executor.domain.network import Network

SIZE = 4
QUIET_S = 0.2
AGAIN_S = 30.0
_LIMIT_S = 60
_MESSAGE_BYTES = 64 * 1024
_MOST_PORTS = 16


class NetworkPool:
    """Used in one thread, by a loop that waits with `events` and calls `look` after each wait."""

    def __init__(self, events: select.poll) -> None:
        self._events = events
        self._network: Mapping[str, Any] | None = None
        self._ports: list[Port] = []
        self._ready: list[tuple[list[str], ReadyNetwork]] = []
        self._maker: tuple[int, socket.socket] | None = None
        self._made = 0
        self._not_before_s = 0.0

    def keep(self, network: Mapping[str, Any], door_ports: list[int]) -> None:
        """From now on SIZE networks such as this one shall be ready.

        Args:
            network: a `Network` in plain values, as specs have it.
            door_ports: of the sandbox's loopback, at which it finds the front door.
        """
        self._drop()
        self._network = network
        self._ports = [(socket.SOCK_DGRAM, network_names.PORT), *((socket.SOCK_STREAM, port) for port in door_ports)]
        self._not_before_s = time.monotonic() + QUIET_S

    def take(self, network: object) -> ReadyNetwork | None:
        """One for an attempt with this network in its spec; None where none is ready. It is the caller's to close."""
        self._not_before_s = max(self._not_before_s, time.monotonic() + QUIET_S)
        if not self._ready or network != self._network:
            return None
        own, ready = self._ready.pop()
        if own == own_addresses():
            return ready
        # Its wall does not know all addresses that the node has by now, and neither does that of any other.
        ready.close()
        self._drop()
        return None

    @property
    def patience_s(self) -> float:
        """How long the loop may wait before it calls `look`."""
        if not self._is_wanting or self._maker:
            return float("inf")
        return max(0.0, self._not_before_s - time.monotonic())

    def look(self) -> None:
        """Takes in what has been made, and has the next one made."""
        if self._maker:
            self._take_in(*self._maker)
        if self._is_wanting and not self._maker and time.monotonic() >= self._not_before_s:
            self._begin()

    @property
    def _is_wanting(self) -> bool:
        return self._network is not None and len(self._ready) < SIZE

    def _begin(self) -> None:
        assert self._network is not None
        ours, theirs = socket.socketpair()
        self._made += 1
        name, zygote = f"ready-{os.getpid()}-{self._made}", os.getpid()
        try:
            pid = os.fork()
        except OSError:  # the node has no room for a process
            ours.close()
            self._not_before_s = time.monotonic() + AGAIN_S
        else:
            if pid == 0:
                _run_maker(theirs, zygote, self._network, self._ports, name)
            ours.setblocking(False)
            self._events.register(ours, select.POLLIN)
            self._maker = pid, ours
        finally:
            theirs.close()

    def _take_in(self, pid: int, channel: socket.socket) -> None:
        descriptors: list[int] = []
        try:
            message, descriptors = kernel.receive(channel, _MESSAGE_BYTES, 1 + _MOST_PORTS)
        except BlockingIOError:
            return
        except OSError as error:
            message = str(error).encode()
        self._events.unregister(channel)
        channel.close()
        os.waitpid(pid, 0)
        self._maker = None
        if not descriptors:
            why = message.decode(errors="replace") or "its maker died"
            print(f"no network can be made ahead, which is tried again later: {why}", file=sys.stderr)
            self._not_before_s = time.monotonic() + AGAIN_S
            return
        made = json.loads(message)
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors[1:]]
        ready = ReadyNetwork(descriptors[0], dict(zip(self._ports, sockets, strict=True)))
        if made["network"] == self._network and made["own"] == own_addresses():
            self._ready.append((made["own"], ready))
        else:
            ready.close()

    def _drop(self) -> None:
        for _, ready in self._ready:
            ready.close()
        self._ready.clear()


def _run_maker(channel: socket.socket, zygote: int, plain: Mapping[str, Any], ports: list[Port], name: str) -> NoReturn:
    try:
        kernel.end_with_parent(signal.SIGKILL, zygote)
        keep_only([channel.fileno()])
        signal.alarm(_LIMIT_S)
        os.nice(19)
        own = own_addresses()
        network = make(Network(**plain), name)
        listeners = listen_inside(network, ports, None)
        message = json.dumps({"own": own, "network": plain}).encode()
        socket.send_fds(channel, [message], [network, *(listener.fileno() for listener in listeners)])
    except Exception as error:
        with contextlib.suppress(OSError):
            channel.send(repr(error).encode()[:4000])
    finally:
        os._exit(0)
