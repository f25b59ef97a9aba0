"""Requests to the API: authorised, repeated when that is safe, and with errors of our own tree.

Everything here is safe to repeat: reading by nature, and the rest because each POST, PATCH and DELETE carries an
`Idempotency-Key` that stays the same however often it is sent.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import Callable
from uuid import uuid4

import httpx

import nabla
from nabla.errors import NablaError, Unavailable, Unreachable, from_problem

FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 5.0
PATIENCE_S = 60.0
TIMEOUT = httpx.Timeout(30.0, connect=5.0)
# The server sends a comment every 15 s, so a stream that is silent for longer than this is dead.
STREAM_TIMEOUT = httpx.Timeout(45.0, connect=5.0)

Params = Mapping[str, "str | int | None"]
OnRetry = Callable[[NablaError], None]


class Transport:
    """One server, one token. `patience_s` bounds how long a request that gets no answer is repeated.

    `on_retry` is called with the reason each time before waiting. `http` and `sleep` are seams for tests.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        patience_s: float = PATIENCE_S,
        on_retry: OnRetry | None = None,
        http: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url
        self.patience_s = patience_s
        self.on_retry = on_retry
        self.sleep = sleep
        self._http = _open(url, token, http)

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
                if time.monotonic() + wait_s > deadline:
                    raise
                self.tell_retry(error)
            self.sleep(wait_s)
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    def tell_retry(self, error: NablaError) -> None:
        if self.on_retry is not None:
            self.on_retry(error)

    def front_door_post(self, path: str, token: str, body: object) -> object:
        """A POST to a deployment's endpoint: sent once, since a prediction need not be idempotent."""
        headers = {"Authorization": f"Bearer {token}"}
        with self._errors():
            response = self._http.post(f"{self.url}{path}", json=body, headers=headers, timeout=300.0)
        return _decoded(response)

    def server_time(self) -> float | None:
        """The server's clock in seconds since the epoch, as its Date header says."""
        with self._errors():
            header = self._http.get("/health").headers.get("date")
        return email.utils.parsedate_to_datetime(header).timestamp() if header else None

    @contextlib.contextmanager
    def stream(self, path: str, params: Params, last_id: str) -> Iterator[Iterator[bytes]]:
        """The chunks of an event stream as they come. Not repeated: its reader knows where to resume."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if last_id:
            headers["Last-Event-ID"] = last_id
        request = self._http.build_request("GET", path, params=_given(params), headers=headers, timeout=STREAM_TIMEOUT)
        with self._errors():
            response = self._http.send(request, stream=True)
            try:
                if response.is_error:
                    response.read()
                    raise _error(response)
                yield response.iter_bytes()
            finally:
                response.close()

    def _once(self, method: str, path: str, body: object, params: Params | None, headers: Mapping[str, str]) -> object:
        content = None if body is None else json.dumps(body).encode()
        kind = {} if content is None else {"Content-Type": "application/json"}
        with self._errors():
            response = self._http.request(
                method, path, content=content, params=_given(params or {}), headers={**headers, **kind}
            )
        return _decoded(response)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx.TransportError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(
                f"Nabla at {self.url} does not answer: {reason}.",
                "Is it running? `nabla up` starts it on this machine; `nabla contexts list` shows which one is used.",
            ) from error


def _open(url: str, token: str, http: httpx.BaseTransport | None) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}", "User-Agent": f"nabla/{nabla.__version__}"}
    # Loading the certificates takes longer than a request, so they are loaded only where TLS is spoken.
    verify: ssl.SSLContext | bool = True if url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return httpx.Client(base_url=f"{url}/api/v1", headers=headers, timeout=TIMEOUT, transport=http, verify=verify)


def _given(params: Params) -> dict[str, str | int]:
    return {name: value for name, value in params.items() if value is not None and value != ""}


def _decoded(response: httpx.Response) -> object:
    if response.is_error:
        raise _error(response)
    if not response.content:
        return {}
    try:
        answer: object = response.json()
    except ValueError as error:
        raise NablaError(
            f"{response.url} answered something that is not JSON.",
            "Is this address a Nabla server's front door?",
        ) from error
    return answer


def _error(response: httpx.Response) -> NablaError:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"title": f"HTTP {response.status_code} {response.reason_phrase}".strip()}
    error = from_problem(response.status_code, problem)
    if isinstance(error, Unavailable):
        error.retry_after_s = _retry_after_s(response.headers.get("retry-after", ""))
    return error


def _retry_after_s(header: str) -> float:
    """Seconds or a date, as RFC 9110 allows; 0 when absent or not understood."""
    if header.isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
