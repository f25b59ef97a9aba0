"""What happens to every request before its route: trace and measure, check the host, bound the body.

Plain ASGI, as Starlette's wrapper class would buffer and delay streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from opentelemetry import propagate
from opentelemetry.trace import SpanKind, Status, StatusCode
from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libs.common.contracts.problem import Problem, problem_of
from libs.common.errors import Refusal, TooLarge
from libs.common.telemetry import current_traceparent, meter, tracer
from services.gateway.http.errors import problem_response, trace_id
from services.gateway.settings import GatewaySettings

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
DROPPED_BYTES = 64 << 20
WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

log = logging.getLogger(__name__)
_seconds = meter().create_histogram(
    "nabla_http_request_seconds",
    unit="s",
    description="From the request's first byte to the response's last, or to the first of a stream",
    explicit_bucket_boundaries_advisory=list(BUCKETS_S),
)


class Traced:
    """A server span per request that continues the caller's trace; the outermost layer, so nothing escapes it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        parent = propagate.extract(dict(Headers(scope=scope)))
        with tracer().start_as_current_span(f"HTTP {method}", context=parent, kind=SpanKind.SERVER) as active:
            exchange = _Exchange(scope, method, send)
            try:
                await self._app(scope, receive, exchange.send)
            except Exception as error:
                log.error("request failed", extra={"method": method, "route": exchange.route}, exc_info=error)
                active.set_status(Status(StatusCode.ERROR))
                if not exchange.status:
                    await problem_response(problem_of(error))(scope, receive, exchange.send)
            active.update_name(f"{method} {exchange.route}")
            active.set_attributes({"http.route": exchange.route, "http.response.status_code": exchange.status})
            exchange.measure()


class _Exchange:
    """One request and how its response goes."""

    def __init__(self, scope: Scope, method: str, send: Send) -> None:
        self._scope = scope
        self._method = method
        self._send = send
        self._started = time.perf_counter()
        self._measured = False
        self.status = 0

    @property
    def route(self) -> str:
        """The route's template: an id in a metric or span name would make one series per object."""
        return getattr(self._scope.get("route"), "path", "") or "unmatched"

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            if found := trace_id():
                headers["x-trace-id"] = found
                headers["traceparent"] = current_traceparent()
            if headers.get("content-type", "").startswith("text/event-stream"):
                # A stream lasts as long as its client likes: what counts is how soon it begins.
                self.measure()
        await self._send(message)

    def measure(self) -> None:
        if self._measured:
            return
        self._measured = True
        labels = {"method": self._method, "route": self.route, "status": str(self.status)}
        _seconds.record(time.perf_counter() - self._started, labels)


class KnownHosts:
    """Answers only to our own names: a foreign page can point its name at us, but cannot change the Host header."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._settings.origins.admits(Headers(scope=scope).get("host", "")):
            await problem_response(UNKNOWN_HOST)(scope, receive, send)
            return
        await self._app(scope, receive, send)


UNKNOWN_HOST = Problem(
    title="Misdirected request",
    status=421,
    code="host_not_allowed",
    detail="This installation does not answer to the host name of the request.",
    remedy="Use the address that `nabla status` shows, or add the name to NABLA_ALLOWED_HOSTS.",
)


class BoundedBodies:
    """Reads a request's whole body, up to a limit and within a time, and checks that JSON is JSON.

    Bulk bytes never come here, so a body fits in memory. What later layers see is small, complete and nested no
    deeper than the parser allows.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in WITH_BODY:
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except Refusal as refusal:
            if isinstance(refusal, TooLarge):
                await self._let_finish(receive)
            await problem_response(problem_of(refusal), {"Connection": "close"})(scope, receive, send)
            return
        if problem := _json_problem(scope, body):
            await problem_response(problem)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._limit(scope["path"])
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                return await _collect(receive, limit)
        except TimeoutError:
            raise SlowBody("body_too_slow", "The body did not arrive in time.", "Send it again.") from None

    async def _let_finish(self, receive: Receive) -> None:
        """Drops the rest, within bounds: a proxy that is still sending when we close tells its client 502, not why."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.body_timeout_s):
                await _drop(receive, DROPPED_BYTES)

    def _limit(self, path: str) -> int:
        filesets = path.rstrip("/") == "/api/v1/filesets"
        return self._settings.fileset_body_limit_bytes if filesets else self._settings.body_limit_bytes


class SlowBody(Refusal):
    status = 408
    title = "Request timeout"


async def _collect(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise SlowBody("client_left", "The client left before its body was whole.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _drop(receive: Receive, limit: int) -> None:
    """Reads up to `limit` bytes and keeps none."""
    message: Message = {"more_body": True}
    while limit > 0 and message.get("more_body", False):
        message = await receive()
        limit -= len(message.get("body", b""))


def _too_large(limit: int) -> TooLarge:
    detail = f"The body is larger than the {limit:,} bytes that this route takes."
    remedy = "Files belong in a file set: see POST /api/v1/filesets."
    return TooLarge("body_too_large", detail, remedy, limit_bytes=limit)


def _json_problem(scope: Scope, body: bytes) -> Problem | None:
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip()
    if not body or not (kind == "application/json" or kind.endswith("+json")):
        return None
    try:
        from_json(body, allow_inf_nan=False)
    except ValueError as error:
        remedy = "Send one JSON document in UTF-8."
        detail = f"The body is not JSON: {error}."
        return Problem(title="Not JSON", status=400, code="invalid_json", detail=detail, remedy=remedy)
    return None


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """The body as one message, then whatever comes: a stream listens for the client to leave."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class GuardedResponses:
    """Headers with which a browser takes nothing from our answers that we did not mean."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in GUARDS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, guarded if scope["type"] == "http" else send)


GUARDS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
