"""The one tree of errors.

NablaError
├── Refusal                what a caller is told: a problem with what happened, why, and what to do
│   ├── Unauthenticated    401
│   ├── Forbidden          403
│   ├── NotFound           404, also for what the caller may not know of
│   ├── Conflict           409
│   ├── TooLarge           413
│   ├── Invalid            422
│   └── Unavailable        503, worth repeating
│       └── DiskFull       the database has no room; repeated until it has
├── MalformedMessage       a body that is not the message its subject promises
├── IllegalTransition      a move the transition table does not have
└── StaleRevision          somebody else saved first

Transient or permanent is decided once, at the bus: only Unavailable, StaleRevision and errors of the database
or the network are repeated; everything else goes to the dead letters. What is not the message's fault is repeated
until it is over: a full disk or a database that is away without an end, a peer or a store that is away for days.
"""

from __future__ import annotations

from typing import ClassVar


class NablaError(Exception):
    """The root."""


class Refusal(NablaError):
    """A refusal that reaches a person.

    Args:
        code: short and stable, for programs: `project_not_found`.
        detail: what happened and why.
        remedy: what to do next.
        facts: further members of the problem document.
    """

    status: ClassVar[int] = 400
    title: ClassVar[str] = "The request was refused"

    def __init__(self, code: str, detail: str, remedy: str = "", **facts: str | int | float) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.remedy = remedy
        self.facts = facts


class Unauthenticated(Refusal):
    status = 401
    title = "No valid token"


class Forbidden(Refusal):
    status = 403
    title = "Not allowed"


class NotFound(Refusal):
    status = 404
    title = "Not found"


class Conflict(Refusal):
    status = 409
    title = "In conflict with the present state"


class TooLarge(Refusal):
    status = 413
    title = "Too large"


class Invalid(Refusal):
    status = 422
    title = "Not valid"


class Unavailable(Refusal):
    status = 503
    title = "Not available right now"


class DiskFull(Unavailable):
    """The database could not grow. The transaction was rolled back, so the same message can be repeated.

    Args:
        where: the folder or server that needs space.
    """

    def __init__(self, where: str) -> None:
        super().__init__(
            "disk_full",
            f"The disk that holds the database at {where} is full. This was not done, and nothing that was is lost.",
            f"Free space at {where}, then repeat it with the same Idempotency-Key.",
        )


class MalformedMessage(NablaError):
    def __init__(self, message: str, fields: tuple[str, ...]) -> None:
        super().__init__(f"{message} has wrong fields: {', '.join(fields)}")
        self.message = message
        self.fields = fields


class IllegalTransition(NablaError):
    def __init__(self, aggregate: str, object_id: str, state: str, trigger: str) -> None:
        super().__init__(f"{aggregate} {object_id} is {state}: {trigger} is not possible")
        self.state = state
        self.trigger = trigger


class StaleRevision(NablaError):
    def __init__(self, table: str, object_id: str, revision: int) -> None:
        super().__init__(f"{table} {object_id} is no longer at revision {revision}")


REFUSALS: dict[int, type[Refusal]] = {
    kind.status: kind
    for kind in (Refusal, Unauthenticated, Forbidden, NotFound, Conflict, TooLarge, Invalid, Unavailable)
}
