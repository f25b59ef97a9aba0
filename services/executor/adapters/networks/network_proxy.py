"""The internet for a sandbox that has loopback only: an HTTP proxy that is served from outside of it.

Names are resolved out here, each address is judged, and the connection goes to an address that was judged: a name that
answers differently the second time gains nothing, and a redirect is a new request. TLS stays between the two ends.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401  (names are looked up as the job's uid, which may not read Python's own folder)
import socket
import threading
from collections.abc import Sequence
from typing import NoReturn
from urllib.parse import urlsplit

from services.executor.domain.network import is_public

PORT = 3128
_CONNECTIONS = 256
_HEAD_BYTES = 64 * 1024
_COPY_BYTES = 64 * 1024
_HEAD_S = 30.0
_CONNECT_S = 20.0
_IDLE_S = 900.0
# Of the client's connection to the proxy, and not of its request to the server.
_OWN_HEADERS = (b"connection", b"proxy-connection", b"proxy-authorization", b"keep-alive")


class Refused(Exception):
    """A request that is not passed on: the status and why, for the user to read."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def variables() -> dict[str, str]:
    """What makes programs in the sandbox use the proxy."""
    url, direct = f"http://127.0.0.1:{PORT}", "localhost,127.0.0.1,::1"
    names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    return dict.fromkeys(names, url) | {"no_proxy": direct, "NO_PROXY": direct}


def serve(listener: socket.socket, allowed: Sequence[str], own: Sequence[str]) -> NoReturn:
    """Serve until the process is killed; a thread for each connection, and those beyond the limit wait."""
    places = threading.BoundedSemaphore(_CONNECTIONS)

    def answer(client: socket.socket) -> None:
        try:
            with client:
                _answer(client, allowed, own)
        finally:
            places.release()

    listener.setblocking(True)
    while True:
        places.acquire()
        client, _ = listener.accept()
        threading.Thread(target=answer, args=(client,), daemon=True).start()


def _answer(client: socket.socket, allowed: Sequence[str], own: Sequence[str]) -> None:
    try:
        client.settimeout(_HEAD_S)
        head, rest = _read_head(client)
        host, port, first = _asked_for(head)
        server = _connect(host, port, allowed, own)
    except Refused as refused:
        body = f"nabla: {refused}\n".encode()
        head = f"HTTP/1.1 {refused.status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n".encode()
        with contextlib.suppress(OSError):
            client.sendall(head + b"Content-Type: text/plain\r\n\r\n" + body)
        return
    except OSError:
        return
    with server, contextlib.suppress(OSError):
        if first:
            server.sendall(first + rest)
        else:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            server.sendall(rest)
        _copy(client, server)


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    received = b""
    while b"\r\n\r\n" not in received:
        piece = client.recv(_COPY_BYTES)
        received += piece
        if not piece or len(received) > _HEAD_BYTES:
            raise Refused("400 Bad Request", "the request has no end, or a head that is too long")
    head, _, rest = received.partition(b"\r\n\r\n")
    return head, rest


def _asked_for(head: bytes) -> tuple[str, int, bytes]:
    """Host, port, and what to send there first: nothing for a tunnel."""
    line, *headers = head.split(b"\r\n")
    try:
        method, target, version = line.decode("ascii").split(" ")
        url = urlsplit(f"//{target}" if method == "CONNECT" else target)
        host, port = url.hostname or "", url.port
    except ValueError:
        raise Refused("400 Bad Request", "the request is not one for a proxy") from None
    if not host or (method != "CONNECT" and url.scheme != "http"):
        raise Refused("400 Bad Request", f"the proxy takes http:// and tunnels for https://, not {target[:200]}")
    if method == "CONNECT":
        return host, port or 443, b""
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    kept = [header for header in headers if header.partition(b":")[0].strip().lower() not in _OWN_HEADERS]
    first = b"\r\n".join([f"{method} {path} {version}".encode(), *kept, b"Connection: close", b"", b""])
    return host, port or 80, first


def _connect(host: str, port: int, allowed: Sequence[str], own: Sequence[str]) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Refused("502 Bad Gateway", f"the name {host} is not known") from None
    public = [entry for entry in found if is_public(str(entry[4][0]), allowed, own)]
    if not public:
        raise Refused("403 Forbidden", f"{host} is not a public address: jobs here reach the platform and the internet")
    for family, kind, protocol, _, address in public:
        server = socket.socket(family, kind, protocol)
        try:
            server.settimeout(_CONNECT_S)
            server.connect(address)
        except OSError:
            server.close()
        else:
            return server
    raise Refused("502 Bad Gateway", f"{host} port {port} does not answer")


def _copy(client: socket.socket, server: socket.socket) -> None:
    """Both directions until both have ended, or nothing has come for long. Apart, as one may be full for a while."""
    for end in (client, server):
        end.settimeout(_IDLE_S)
    back = threading.Thread(target=_copy_one_way, args=(server, client), daemon=True)
    back.start()
    _copy_one_way(client, server)
    back.join()


def _copy_one_way(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(_COPY_BYTES):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
        return
    for end in (source, target):  # broken: nothing more will come of the other direction either
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
