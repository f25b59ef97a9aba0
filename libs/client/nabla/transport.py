"""Requests to the API: authorised, repeated when that is safe, and with errors of our own tree.

Everything here is safe to repeat: reading by nature, and the rest because each POST, PATCH and DELETE carries an
`Idempotency-Key` that stays the same however often it is sent.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Callable
from urllib.parse import urlencode
from uuid import uuid4

import nabla
from nabla import tracing
from nabla.errors import BadConfig, NablaError, Unavailable, Unreachable, from_problem
from nabla.http import WHAT_TO_TRUST, BrokenConnection, Http, Response, Untrusted, split_address

if TYPE_CHECKING:
    from nabla.tunnel import Tunnel

FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 5.0
PATIENCE_S = 60.0
TIMEOUT_S = 30.0
NOT_OURS = (
    "That is no answer of Nabla's own: is the address its front door (`nabla contexts list`), and does a proxy "
    "stand between (NO_PROXY)?"
)
# The server sends a comment every 15 s, so a stream that is silent for longer than this is dead.
STREAM_TIMEOUT_S = 45.0

Params = Mapping[str, "str | int | None"]
OnRetry = Callable[[NablaError, float], None]


class Transport:
    """One server, one token. `patience_s` bounds how long a request that gets no answer is repeated.

    `on_retry` is called each time before waiting, with the reason and for how many seconds more it is tried. With
    `traceparent` all requests belong to one trace, without it each to its own. `ca` is a file of certificates to
    trust. `sleep` is a seam for tests.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        patience_s: float = PATIENCE_S,
        on_retry: OnRetry | None = None,
        traceparent: str = "",
        ca: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = _checked_address(url)
        self.patience_s = patience_s
        self.on_retry = on_retry
        self.sleep = sleep
        self._traceparent = traceparent
        self._headers = {"Authorization": f"Bearer {_checked_token(token)}", "User-Agent": f"nabla/{nabla.__version__}"}
        self.ca = ca
        self._http = Http(ca)

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, params: Params | None = None) -> object:
        return self.request("GET", path, params=params)

    def post(self, path: str, body: object = None) -> object:
        return self.request("POST", path, body=body if body is not None else {})

    def request(self, method: str, path: str, *, body: object = None, params: Params | None = None) -> object:
        """The decoded answer. Raises an ApiError, or Unreachable."""
        headers = {} if method == "GET" else {"Idempotency-Key": str(uuid4())}
        deadline, delay_s = time.monotonic() + self.patience_s, FIRST_DELAY_S
        while True:
            try:
                return self._once(method, path, body, params, headers)
            except (Unreachable, Unavailable) as error:
                asked_s = error.retry_after_s if isinstance(error, Unavailable) else 0.0
                wait_s = max(delay_s, asked_s)
                left_s = deadline - time.monotonic()
                if wait_s > left_s:
                    raise
                self.tell_retry(error, left_s)
            self.sleep(wait_s)
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    def tell_retry(self, error: NablaError, left_s: float) -> None:
        if self.on_retry is not None:
            self.on_retry(error, left_s)

    def front_door_post(self, path: str, token: str, body: object) -> object:
        """A POST to a deployment's endpoint: sent once, since a prediction need not be idempotent."""
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        with self._errors(), self._http.send("POST", f"{self.url}{path}", headers, _encoded(body), 300.0) as response:
            return _decoded(response)

    def upgrade(self, path: str, authorization: str, protocol: str) -> Tunnel:
        """A stream of another protocol, where a request to this path below the front door is answered with one."""
        with self._errors():
            answer = self._http.upgrade(f"{self.url}{path}", {"Authorization": authorization}, protocol)
            if not isinstance(answer, Response):
                return answer
            with answer:
                said = answer.read().decode("utf-8", "replace").strip()
        raise NablaError(f"The job cannot be entered: {said[:500] or answer.reason}", "See `nabla jobs get JOB`.")

    def installation_id(self) -> str:
        return self._id_in(self.get("/health"))

    def server_time(self) -> float | None:
        """The server's clock in seconds since the epoch, as its Date header says. Asked once, as clocks go on."""
        with self._errors(), self._send("GET", "/health", None, {}, {}) as response:
            self._id_in(_decoded(response))
            header = response.header("Date")
        return email.utils.parsedate_to_datetime(header).timestamp() if header else None

    def _id_in(self, answer: object) -> str:
        if not (isinstance(answer, dict) and "installation_id" in answer):
            raise NablaError(f"What answers at {self.url} is not Nabla.", NOT_OURS)
        return str(answer["installation_id"] or "")

    @contextlib.contextmanager
    def stream(self, path: str, params: Params, last_id: str) -> Iterator[Iterator[bytes]]:
        """The chunks of an event stream as they come. Not repeated: its reader knows where to resume."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if last_id:
            headers["Last-Event-ID"] = last_id
        with self._errors(), self._send("GET", path, None, params, headers, STREAM_TIMEOUT_S) as response:
            if not response.ok:
                raise _error(response)
            if not response.header("Content-Type").startswith("text/event-stream"):
                raise NablaError("The server answered something that is not a stream of events.", NOT_OURS)
            yield response.chunks()

    def _once(self, method: str, path: str, body: object, params: Params | None, headers: Mapping[str, str]) -> object:
        with self._errors(), self._send(method, path, body, params or {}, headers) as response:
            return _decoded(response)

    def _send(
        self,
        method: str,
        path: str,
        body: object,
        params: Params,
        headers: Mapping[str, str],
        timeout_s: float = TIMEOUT_S,
    ) -> Response:
        query = urlencode({name: value for name, value in params.items() if value not in (None, "")})
        url = f"{self.url}/api/v1{path}" + (f"?{query}" if query else "")
        given = {"traceparent": self._traceparent or tracing.traceparent()}
        if body is not None:
            given["Content-Type"] = "application/json"
        return self._http.send(method, url, {**self._headers, **given, **headers}, _encoded(body), timeout_s)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Untrusted as error:
            raise NablaError(f"Nabla at {self.url} cannot be asked: {error}.", WHAT_TO_TRUST) from error
        except BrokenConnection as error:
            raise Unreachable(
                f"Nabla at {self.url} does not answer: {error}.",
                "Is it running? `nabla up` starts it on this machine; `nabla contexts list` shows which one is used.",
            ) from error


def _checked_address(url: str) -> str:
    try:
        split_address(url)
    except BrokenConnection as error:
        raise BadConfig(f"{error}.", "Write it like http://HOST:PORT: `nabla login URL`, or NABLA_URL.") from error
    return url


def _checked_token(token: str) -> str:
    """Without the line end that `$(cat FILE)` on Windows or a pasted line brings along. Never shown in an error."""
    token = token.strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise BadConfig(
            "The token holds characters that no token has.",
            "Copy it again, whole and alone: `nabla login URL` asks for it; NABLA_TOKEN may hold it too.",
        )
    return token


def _encoded(body: object) -> bytes | None:
    return None if body is None else json.dumps(body).encode()


def _decoded(response: Response) -> object:
    if not response.ok:
        raise _error(response)
    try:
        return response.json()
    except ValueError as error:
        raise NablaError("The server answered something that is not JSON.", NOT_OURS) from error


def _error(response: Response) -> NablaError:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not (isinstance(problem, dict) and problem):
        problem = {"title": f"HTTP {response.status} {response.reason}".strip(), "remedy": NOT_OURS}
        if response.header("Location"):
            problem["detail"] = f"it sends on to {response.header('Location')}"
    error = from_problem(response.status, problem)
    if isinstance(error, Unavailable):
        error.retry_after_s = _retry_after_s(response.header("Retry-After"))
    return error


def _retry_after_s(header: str) -> float:
    """Seconds or a date, as RFC 9110 allows; 0 when absent or not understood."""
    if header.isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
