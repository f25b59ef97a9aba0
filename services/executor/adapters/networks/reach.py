"""What the platform's own tools on a node may connect to: the places that are named, and nothing else.

A tool's sandbox has no network but its loopback; on it listens this gate, an HTTP proxy that knows a few places by
host and port. Names are resolved out here, and the address that was checked is the one that is connected to, so a
name that points into the node's own network (or does so only the second time) leads nowhere. A place that the
platform's settings name may be anywhere; one that a user names must have a public address.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import select
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from libs.common.errors import NablaError

CONNECT_S = 20.0
SILENT_S = 300.0
MAX_HEAD_BYTES = 64 * 1024
MOST_REFUSED = 10
_CHUNK_BYTES = 256 * 1024
_HOP_HEADERS = (b"connection:", b"proxy-connection:", b"proxy-authorization:", b"keep-alive:")


class OutOfReach(NablaError):
    """The place may not be connected to, or does not answer; the text says why, for the user to read."""


@dataclass(frozen=True, slots=True)
class Place:
    """A host and port. `trusted`: the platform's own settings name it, so it may have any address."""

    host: str
    port: int
    trusted: bool = False

    @classmethod
    def of_url(cls, url: str, trusted: bool = False) -> Place:
        parts = urlsplit(url)
        return cls((parts.hostname or "").lower(), port_of(parts), trusted)


def port_of(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def connect(place: Place) -> socket.socket:
    """A connection to the place itself. Raises OutOfReach."""
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise OutOfReach(f"{place.host} is not known here: {error}") from error
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        if not place.trusted and not is_public(str(address[0])):
            raise OutOfReach(f"{place.host} has the private address {address[0]}, which this node does not connect to")
        try:
            return _connected(family, kind, protocol, address)
        except OSError as error:
            failure = error
    raise OutOfReach(f"{place.host}:{place.port} does not answer: {failure}")


def is_public(address: str) -> bool:
    """Also of an IPv4 address that is written as one of IPv6."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return found.is_global and not found.is_multicast and (inner is None or inner.is_global)


def _connected(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    connection = socket.socket(family, kind, protocol)
    try:
        connection.settimeout(CONNECT_S)
        connection.connect(address)
        connection.settimeout(SILENT_S)
    except OSError:
        connection.close()
        raise
    return connection


class Gate:
    """A proxy for a few places; `refused` says what else was asked for, or why one of them was not reached."""

    def __init__(self, places: Collection[Place]) -> None:
        self._places = {(place.host, place.port): place for place in places}
        self.refused: list[str] = []
        self.port = 0

    def find(self, host: str, port: int) -> Place:
        """Raises OutOfReach."""
        place = self._places.get((host.lower(), port))
        if place is None:
            raise OutOfReach(f"{host}:{port} is not among the places that may be reached from here")
        return place

    def note(self, error: OutOfReach) -> None:
        if str(error) not in self.refused and len(self.refused) < MOST_REFUSED:
            self.refused.append(str(error))

    @contextmanager
    def opened(self) -> Iterator[Gate]:
        """Listens on a free port of the loopback within the block."""
        server = _Server(("127.0.0.1", 0), _Connection)
        server.gate = self
        self.port = int(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    gate: Gate


class _Connection(BaseRequestHandler):
    """One request: the connection ends with it, so each one is judged anew."""

    server: _Server
    request: socket.socket

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.settimeout(SILENT_S)
            head, rest = _read_head(self.request)
            try:
                self._serve(head, rest)
            except OutOfReach as error:
                self.server.gate.note(error)
                text = f"{error}\n".encode()
                answer = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: "
                self.request.sendall(answer + str(len(text)).encode() + b"\r\n\r\n" + text)

    def _serve(self, head: bytes, rest: bytes) -> None:
        first, _, headers = head.partition(b"\r\n")
        method, _, target = first.decode("latin-1").rpartition(" ")[0].partition(" ")
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            place = self.server.gate.find(host.strip("[]"), int(port) if port.isdigit() else 0)
            with _opened(place, "https") as far:
                self.request.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                _exchange(self.request, far, rest)
            return
        url = urlsplit(target)
        if url.scheme != "http" or not url.hostname:
            raise OutOfReach("only a proxy's requests are answered here")
        place = self.server.gate.find(url.hostname, port_of(url))
        with _opened(place, "http") as far:
            path = f"{method} {url.path or '/'}{'?' + url.query if url.query else ''} HTTP/1.1\r\n"
            kept = [line for line in headers.split(b"\r\n") if line and not line.lower().startswith(_HOP_HEADERS)]
            far.sendall(path.encode("latin-1") + b"\r\n".join([*kept, b"Connection: close", b"", b""]))
            _exchange(self.request, far, rest)


@contextmanager
def _opened(place: Place, scheme: str) -> Iterator[socket.socket]:
    """Through the node's own proxy where it has one: it may be the only way out."""
    proxy = getproxies_environment().get(scheme, "")
    far = connect(place) if not proxy or proxy_bypass(place.host) else _tunnel(place, proxy)
    with far:
        yield far


def _tunnel(place: Place, proxy: str) -> socket.socket:
    """The proxy resolves names itself; those that can be resolved here are judged all the same."""
    with contextlib.suppress(OSError):
        for *_, address in socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM):
            if not place.trusted and not is_public(str(address[0])):
                raise OutOfReach(f"{place.host} has the private address {address[0]}")
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    far = connect(Place(parts.hostname or "", port_of(parts), trusted=True))
    said = f"CONNECT {place.host}:{place.port} HTTP/1.1\r\nHost: {place.host}:{place.port}\r\n"
    if parts.username:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        said += f"Proxy-Authorization: Basic {base64.b64encode(user.encode()).decode()}\r\n"
    far.sendall(f"{said}\r\n".encode("latin-1"))
    head, _ = _read_head(far)
    if b" 200" not in head.partition(b"\r\n")[0]:
        far.close()
        raise OutOfReach(f"the node's proxy does not connect to {place.host}:{place.port}")
    return far


def _read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(_CHUNK_BYTES)
        received += piece
        if not piece or len(received) > MAX_HEAD_BYTES:
            raise OSError("no HTTP request")
    head, _, rest = received.partition(b"\r\n\r\n")
    return head, rest


def _exchange(near: socket.socket, far: socket.socket, first: bytes) -> None:
    """Copies both ways until both ends have said all, or nothing comes for long."""
    far.sendall(first)
    open_ends = {near: far, far: near}
    while open_ends:
        ready, _, _ = select.select(list(open_ends), [], [], SILENT_S)
        if not ready:
            return
        for source in ready:
            piece = source.recv(_CHUNK_BYTES)
            if piece:
                open_ends[source].sendall(piece)
            else:
                target = open_ends.pop(source)
                target.shutdown(socket.SHUT_WR)
                if source is far:  # the answer is over, whatever the asker leaves open
                    return
