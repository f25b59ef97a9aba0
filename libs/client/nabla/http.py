"""HTTP/1.1 over the standard library, with kept connections: all that this client needs of it.

A full-featured HTTP library takes longer to import than a whole `nabla jobs list` may take, and brings the command
line a second set of dependencies; so requests go through `http.client`, and this module adds the pool, the proxies of
the environment, and one exception for every way in which a connection fails.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import select
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Union
from urllib.parse import SplitResult, unquote, urlsplit

from nabla.address import is_loopback

if TYPE_CHECKING:
    import ssl

    from nabla.tunnel import Tunnel

CONNECT_TIMEOUT_S = 5.0
CHUNK_BYTES = 1 << 16
# Scheme, host, port.
Origin = tuple[str, str, int]
Body = Union[bytes, Iterable[bytes], None]


class BrokenConnection(Exception):
    """Nothing or only part of an answer came: refused, reset, timed out, or not HTTP."""


class Untrusted(BrokenConnection):
    """The other side's certificate is not one that is believed here; trying again does not help."""


WHAT_TO_TRUST = (
    "Is the address right? For a certificate authority of your own set SSL_CERT_FILE=FILE, or sign in with "
    "`nabla login URL --ca FILE`."
)


class Response:
    """An answer whose body is read as it comes. The connection is kept once the body was read to its end."""

    def __init__(self, http: Http, origin: Origin, connection: http.client.HTTPConnection) -> None:
        self._http, self._origin, self.connection = http, origin, connection
        self.raw = connection.getresponse()
        self.status = self.raw.status
        self.reason = self.raw.reason

    @property
    def ok(self) -> bool:
        """A redirect is none: nothing here follows one, since a signed address or a token must not go elsewhere."""
        return 200 <= self.status < 300

    def header(self, name: str) -> str:
        return self.raw.headers.get(name) or ""

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def json(self) -> object:
        """The decoded body; ValueError when it is not JSON, an empty object when there is none."""
        answer: object = json.loads(self.read() or b"{}")
        return answer

    def chunks(self, size_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The body in pieces, each as soon as it is there."""
        try:
            while chunk := self.raw.read1(size_bytes):
                yield chunk
        except (OSError, http.client.HTTPException) as error:
            raise BrokenConnection(_reason(error)) from error
        if self.raw.length:
            raise BrokenConnection(f"{self.raw.length} bytes of the answer are missing")

    def close(self) -> None:
        if self.raw.length == 0:  # all read, which Python before 3.12 does not notice by itself
            self.raw.close()
        if self.raw.isclosed() and not self.raw.will_close:
            self._http.keep(self._origin, self.connection)
        else:
            self._http.drop(self.connection)

    def __enter__(self) -> Response:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Http:
    """A pool of connections, safe to share between threads. `ca` is a file of certificates to trust besides others."""

    def __init__(self, ca: str = "") -> None:
        self._ca = ca
        self._idle: dict[Origin, list[http.client.HTTPConnection]] = {}
        self._used: set[http.client.HTTPConnection] = set()
        self.aborted = False
        self._lock = threading.Lock()

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: Body = None, timeout_s: float = 30.0
    ) -> Response:
        """One request. `timeout_s` bounds each wait for more bytes, not the whole."""
        parts = split_address(url)
        origin = _origin(parts)
        connection = None
        try:
            connection = self._idle_connection(origin) or self._connected(origin)
            self._use(connection)
            connection.sock.settimeout(timeout_s)
            connection.request(method, _target(parts, connection), body=body, headers=_sent(headers, parts, connection))
            return Response(self, origin, connection)
        except BaseException as error:
            if connection is not None:
                self.drop(connection)
            if isinstance(error, (OSError, http.client.HTTPException)):
                raise _broken(error) from error
            raise

    def upgrade(self, url: str, headers: Mapping[str, str], protocol: str) -> Tunnel | Response:
        """A stream of this protocol, or the answer of a server that refuses one."""
        from nabla.tunnel import Tunnel

        asked = {**headers, "Connection": "Upgrade", "Upgrade": protocol}
        response = self.send("GET", url, asked)
        if response.status != HTTPStatus.SWITCHING_PROTOCOLS:
            return response
        with self._lock:
            self._used.discard(response.connection)
        return Tunnel(response.connection, response.raw)

    def keep(self, origin: Origin, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._used.discard(connection)
            self._idle.setdefault(origin, []).append(connection)

    def drop(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._used.discard(connection)
        connection.close()

    def abort(self) -> None:
        """Breaks what is under way in other threads, even where it waits for a peer that has gone silent."""
        with self._lock:
            self.aborted = True
            for connection in self._used:
                _shut(connection)

    def _use(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._used.add(connection)
            if self.aborted:
                _shut(connection)

    def close(self) -> None:
        with self._lock:
            for connection in [one for kept in self._idle.values() for one in kept]:
                connection.close()
            self._idle.clear()

    def _connected(self, origin: Origin) -> http.client.HTTPConnection:
        scheme, host, port = origin
        proxy = _proxy(scheme, host, port)
        near = (proxy.hostname or "", proxy.port or 80) if proxy else (host, port)
        if scheme == "http":
            connection = http.client.HTTPConnection(near[0], near[1], timeout=CONNECT_TIMEOUT_S)
        else:
            connection = http.client.HTTPSConnection(
                near[0], near[1], timeout=CONNECT_TIMEOUT_S, context=self._certificates
            )
            if proxy:
                connection.set_tunnel(host, port, _credentials(proxy))
        connection.connect()
        return connection

    @cached_property
    def _certificates(self) -> ssl.SSLContext:
        """Reading them takes longer than a request, so once is enough."""
        import ssl

        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        if self._ca:
            try:
                context.load_verify_locations(self._ca)
            except OSError as error:
                raise Untrusted(f"{self._ca} cannot be used as --ca: {_reason(error)}") from error
        return context

    def _idle_connection(self, origin: Origin) -> http.client.HTTPConnection | None:
        """One that the server has not closed meanwhile: on a closed one there is an end of file to read."""
        with self._lock:
            kept = self._idle.get(origin, [])
            while kept:
                connection = kept.pop()
                if _is_silent(connection):
                    return connection
                connection.close()
        return None


def _is_silent(connection: http.client.HTTPConnection) -> bool:
    try:
        return connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]
    except ValueError:  # select knows only the first 1,024 descriptors
        return False


def _shut(connection: http.client.HTTPConnection) -> None:
    with contextlib.suppress(OSError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def split_address(url: str) -> SplitResult:
    """The parts of an address that one can connect to, or BrokenConnection."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise BrokenConnection(f"{url!r} is not an http or https address")


def _origin(parts: SplitResult) -> Origin:
    assert parts.hostname
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _proxy(scheme: str, host: str, port: int) -> SplitResult | None:
    """From `http_proxy`, `https_proxy` and `no_proxy`, in either case; never for this machine itself.

    A proxy knows nothing of this machine's own addresses, and few people think of naming them in `no_proxy`.
    """
    if is_loopback(host) or not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return None
    from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

    proxies = getproxies_environment()
    address = proxies.get(scheme) or proxies.get("all")
    if not address or proxy_bypass_environment(f"{host}:{port}"):
        return None
    return split_address(address if "://" in address else f"http://{address}")


def _credentials(proxy: SplitResult) -> dict[str, str]:
    """What `http://USER:PASSWORD@HOST` in the environment says about them."""
    if proxy.username is None:
        return {}
    said = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(said.encode()).decode()}"}


def _sent(headers: Mapping[str, str], parts: SplitResult, connection: http.client.HTTPConnection) -> dict[str, str]:
    """A plain proxy reads its credentials from each request; a tunnel has had them when it was made."""
    proxy = _proxy(*_origin(parts)) if _is_proxied(parts, connection) else None
    return {**headers, **(_credentials(proxy) if proxy else {})}


def _is_proxied(parts: SplitResult, connection: http.client.HTTPConnection) -> bool:
    return parts.scheme == "http" and (connection.host, connection.port) != _origin(parts)[1:]


def _target(parts: SplitResult, connection: http.client.HTTPConnection) -> str:
    """The path as it stands (signed addresses must not be rewritten); the whole address for a plain proxy."""
    if _is_proxied(parts, connection):
        return parts._replace(fragment="").geturl()
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _broken(error: Exception) -> BrokenConnection:
    refused = getattr(error, "verify_message", "")  # of an ssl.SSLCertVerificationError
    return Untrusted(f"its certificate is not trusted ({refused})") if refused else BrokenConnection(_reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror if isinstance(error, OSError) else str(error)) or str(error) or type(error).__name__
