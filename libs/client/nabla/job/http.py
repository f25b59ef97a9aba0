"""The API from inside a job, with urllib: every job has that, whatever else its environment lacks."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Callable, Dict, Mapping, Optional, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

from nabla.address import is_loopback
from nabla.errors import ApiError, NablaError, TransferError, Unavailable, Unreachable, from_problem
from nabla.job.identity import JobIdentity
from nabla.tracing import traceparent

T = TypeVar("T")
TIMEOUT_S = 30.0
FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 5.0


def post(
    identity: JobIdentity, path: str, body: Mapping[str, object], patience_s: float = 60.0, key: str = ""
) -> Dict[str, object]:
    """One POST, repeated under the same idempotency key until answered: it takes effect once.

    Whoever may call again for the same thing after patience ran out gives the `key`.
    """
    data = json.dumps(body).encode()
    headers = {
        "Authorization": f"Bearer {identity.token}",
        "Content-Type": "application/json",
        "Idempotency-Key": key or str(uuid4()),
        "traceparent": traceparent(),
    }
    url = f"{identity.api_url}/api/v1{path}"

    def once() -> Dict[str, object]:
        request = urllib.request.Request(url, data=data, headers=headers, method="POST")
        try:
            answer = json.loads(_send(request) or b"{}")
        except ValueError as error:
            raise NablaError(f"{request.host} answered something that is not JSON.") from error
        return answer if isinstance(answer, dict) else {}

    return repeat(once, patience_s)


def put_file(url: str, source: Path, size_bytes: int, patience_s: float = 60.0) -> None:
    """Streams a file to a presigned URL, from its start again when the connection breaks."""

    def once() -> None:
        with source.open("rb") as stream:
            request = urllib.request.Request(url, data=stream, method="PUT")
            request.add_header("Content-Length", str(size_bytes))
            request.add_header("Content-Type", "application/octet-stream")
            _store(request)

    try:
        repeat(once, patience_s)
    except NablaError as error:
        raise TransferError(f"Uploading {source.name!r} failed: {error}", error.remedy) from error


def repeat(once: Callable[[], T], patience_s: float, sleep: Callable[[float], None] = time.sleep) -> T:
    """Calls until it succeeds, fails for good, or patience runs out; waits 0.2 s, doubling to 5 s."""
    deadline, delay_s = time.monotonic() + patience_s, FIRST_DELAY_S
    while True:
        try:
            return once()
        except (Unreachable, Unavailable):
            if time.monotonic() + delay_s > deadline:
                raise
        sleep(delay_s)
        delay_s = min(delay_s * 2, LONGEST_DELAY_S)


def _store(request: urllib.request.Request) -> None:
    """Object storage means "again later" by any 5xx."""
    try:
        _send(request)
    except ApiError as error:
        if error.status < 500:
            raise
        raise Unavailable(error.status, {"title": error.title}) from error


def _send(request: urllib.request.Request) -> bytes:
    try:
        with _opener(request).open(request, timeout=TIMEOUT_S) as response:
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as error:
        raise from_problem(error.code, _problem(error)) from error
    except (OSError, HTTPException) as error:
        reason: Optional[object] = getattr(error, "reason", None) or error
        raise Unreachable(f"{request.host} does not answer: {reason}.") from error


def _opener(request: urllib.request.Request) -> urllib.request.OpenerDirector:
    """Of this machine's own addresses, where a sandbox has its way out, a proxy of the job's knows nothing."""
    near = is_loopback(urlsplit(request.full_url).hostname or "")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if near else []))


def _problem(error: urllib.error.HTTPError) -> Dict[str, object]:
    try:
        problem = json.loads(error.read() or b"{}")
    except (ValueError, OSError):
        problem = None
    return problem if isinstance(problem, dict) else {"title": f"HTTP {error.code} {error.reason}"}
