"""Names for a sandbox: port 53 of its loopback leads to the node's own name servers.

Served from outside, so that it works whatever the node's resolver is: systemd-resolved's 127.0.0.53 or a server in a
private network, neither of which a sandbox may reach itself.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

PORT = 53
_QUERIES_AT_ONCE = 512
_ANSWERS_S = 2.0
_LIMIT_S = 10.0
_DATAGRAM_BYTES = 65535


def name_servers(path: str = "/etc/resolv.conf") -> list[str]:
    """The node's, in the order in which it asks them. None listed means one on the node itself, as in the C library."""
    words = [line.split() for line in _lines_of(path)]
    listed = [word[1].partition("%")[0] for word in words if len(word) > 1 and word[0] == "nameserver"]
    return [address for address in listed if _is_address(address)] or ["127.0.0.1"]


def resolver_file(path: str = "/etc/resolv.conf") -> str:
    """resolv.conf for the sandbox: the node's, but for whom to ask."""
    kept = [line for line in _lines_of(path) if line.split()[:1] and line.split()[0] in ("search", "domain", "options")]
    return "\n".join(["nameserver 127.0.0.1", *kept, ""])


def relay_names(listener: socket.socket, servers: Sequence[str]) -> NoReturn:
    """Pass queries on, and answers back, until the process is killed."""
    _Names(listener, servers).run()


class _Query(NamedTuple):
    client: tuple[str, int]
    number: bytes
    asked_at: float
    server: int


class _Names:
    """One socket for each query: its port is the kernel's choice, so that nobody can guess where to forge an answer.

    A server that does not answer in time is passed over for the queries that follow, and clients ask again.
    """

    def __init__(self, listener: socket.socket, servers: Sequence[str]) -> None:
        self._listener = listener
        self._servers = servers
        self._preferred = 0
        self._asked: OrderedDict[socket.socket, _Query] = OrderedDict()
        self._poll = select.epoll()
        self._by_number: dict[int, socket.socket] = {}
        self._poll.register(listener.fileno(), select.EPOLLIN)

    def run(self) -> NoReturn:
        while True:
            for number, _ in self._poll.poll(1.0 if self._asked else None):
                if number == self._listener.fileno():
                    self._ask()
                elif number in self._by_number:
                    self._answer(self._by_number[number])
            self._give_up()

    def _ask(self) -> None:
        with suppress(OSError):  # nothing there after all, or no way to the server: the client asks again
            content, client = self._listener.recvfrom(_DATAGRAM_BYTES)
            if len(self._asked) >= _QUERIES_AT_ONCE:
                self._forget(next(iter(self._asked)))
            address = self._servers[self._preferred]
            upstream = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
            upstream.setblocking(False)
            self._asked[upstream] = _Query(client, content[:2], time.monotonic(), self._preferred)
            self._by_number[upstream.fileno()] = upstream
            self._poll.register(upstream.fileno(), select.EPOLLIN)
            try:
                upstream.connect((address, PORT))
                upstream.send(content)
            except OSError:
                self._pass_over(self._forget(upstream))
                raise

    def _answer(self, upstream: socket.socket) -> None:
        query = self._asked[upstream]
        try:
            content = upstream.recv(_DATAGRAM_BYTES)
        except BlockingIOError:
            return
        except OSError:  # refused
            self._pass_over(self._forget(upstream))
            return
        if content[:2] != query.number:
            return
        self._forget(upstream)
        with suppress(OSError):
            self._listener.sendto(content, query.client)

    def _give_up(self) -> None:
        now = time.monotonic()
        for upstream, query in list(self._asked.items()):
            if now - query.asked_at < _ANSWERS_S:
                return
            self._pass_over(query)
            if now - query.asked_at > _LIMIT_S:
                self._forget(upstream)

    def _pass_over(self, query: _Query) -> None:
        if query.server == self._preferred:
            self._preferred = (self._preferred + 1) % len(self._servers)

    def _forget(self, upstream: socket.socket) -> _Query:
        self._poll.unregister(upstream.fileno())
        del self._by_number[upstream.fileno()]
        upstream.close()
        return self._asked.pop(upstream)


def _lines_of(path: str) -> list[str]:
    with suppress(OSError):
        return Path(path).read_text(errors="replace").splitlines()
    return []


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
