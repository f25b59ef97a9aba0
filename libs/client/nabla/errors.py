"""Everything that this package raises on purpose.

NablaError                   what happened and why; .remedy says what to do next
├── NotInJob                 log() or save_model() outside a job
├── NoServer                 no context says which server to talk to
├── BadConfig                a file of the client's own cannot be read or written
├── WorkspaceError           the folder cannot be packed as it is
├── TransferError            bytes did not arrive, or not whole
├── WaitTimeout              what was waited for did not happen in time
├── Unreachable              the server does not answer
└── ApiError                 the server answered with a problem (RFC 9457)
    ├── Invalid              400, 413, 422: the request is wrong
    ├── Unauthenticated      401: no token, or not a valid one
    ├── Forbidden            403: the token may not do this
    ├── NotFound             404
    ├── Conflict             409: it exists already, or is in a state that forbids this
    └── Unavailable          429, 502, 503, 504, still after repeating
"""

from __future__ import annotations

from typing import Mapping


class NablaError(Exception):
    """The base of all: `str()` says what happened and why, `remedy` what to do next."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class NotInJob(NablaError):
    """Raised where a function needs the identity of the job it runs in and there is none."""


class NoServer(NablaError):
    """Neither options, environment, installation nor saved contexts name a server."""


class BadConfig(NablaError):
    """A file that the client keeps for itself is damaged or out of reach."""


class WorkspaceError(NablaError):
    """A folder that cannot be packed: unreadable, or changing while it is read."""


class TransferError(NablaError):
    """An upload or download that failed or arrived damaged."""


class WaitTimeout(NablaError):
    """The wait is over; what was waited for goes on on the server."""


class Unreachable(NablaError):
    """No answer, after repeating for as long as the client's patience lasts."""


class ApiError(NablaError):
    """A problem document: `code` is for programs, `status` is HTTP's, `extra` holds members beyond the standard.

    `trace_id` finds the request in the server's logs and traces.
    """

    def __init__(self, status: int, problem: Mapping[str, object]) -> None:
        self.status = status
        self.title = str(problem.get("title") or f"HTTP {status}")
        self.detail = str(problem.get("detail") or "")
        self.code = str(problem.get("code") or "")
        self.trace_id = str(problem.get("trace_id") or "")
        self.extra = {name: value for name, value in problem.items() if name not in _STANDARD}
        message = f"{self.title}: {self.detail}" if self.detail else self.title
        super().__init__(message, str(problem.get("remedy") or ""))


class Invalid(ApiError):
    """The request itself is wrong; repeating it will not help."""


class Unauthenticated(ApiError):
    """The token is missing, expired, revoked or of another server."""


class Forbidden(ApiError):
    """The token is known and may not do this."""


class NotFound(ApiError):
    """No such object, or none that this token may see."""


class Conflict(ApiError):
    """The object's present state forbids the request."""


class Unavailable(ApiError):
    """The server, or a part it needs, is not ready; the same request may work later.

    `retry_after_s` is how long the server asked to wait, 0 when it did not say.
    """

    retry_after_s = 0.0


_STANDARD = ("type", "title", "status", "detail", "remedy", "code", "trace_id", "instance")
_BY_STATUS = {
    400: Invalid,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: Invalid,
    422: Invalid,
    429: Unavailable,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def from_problem(status: int, problem: Mapping[str, object]) -> ApiError:
    """The member of the tree that fits an answer's status."""
    return _BY_STATUS.get(status, ApiError)(status, problem)
