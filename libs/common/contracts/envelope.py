"""What travels around a message: CloudEvents 1.0 in NATS headers, plus who acts and which trace it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from libs.common.contracts.messages import Principal
from libs.common.errors import MalformedMessage, Unauthenticated

ANSWER_OK = "ok"
ANSWER_CREATED = "created"
ANSWER_DUPLICATE = "duplicate"
ANSWER_REFUSED = "refused"
STATUS_HEADER = "nabla-status"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Envelope:
    """The headers of one message.

    `id` is the outbox row's id: it is also the JetStream de-duplication id and the key of the receiver's inbox.
    """

    id: str
    type: str
    source: str
    time: datetime
    object_id: str = ""
    team_id: str = ""
    project_id: str = ""
    revision: int = 0
    attempt: int = 0
    idempotency_key: str = ""
    # Of what the client said under this key, where that is not the message itself.
    request_hash: str = ""
    # Asks only for the answer that was given under the key.
    only_repeat: bool = False
    traceparent: str = ""
    sender: Principal | None = field(default=None)
    # What the route's `prepare` found out before the transaction; never on the wire.
    facts: object = field(default=None, compare=False)

    @property
    def principal(self) -> Principal:
        """Who acts.

        Raises:
            Unauthenticated: the message names nobody.
        """
        if self.sender is None:
            raise Unauthenticated("no_principal", "The message does not say who acts.")
        return self.sender

    def headers(self) -> dict[str, str]:
        optional = {
            "ce-subject": self.object_id,
            "ce-team": self.team_id,
            "ce-project": self.project_id,
            "ce-revision": str(self.revision) if self.revision else "",
            "ce-attempt": str(self.attempt) if self.attempt else "",
            "nabla-idempotency-key": self.idempotency_key,
            "nabla-request-hash": self.request_hash,
            "nabla-only-repeat": "true" if self.only_repeat else "",
            "traceparent": self.traceparent,
            "nabla-principal": self.sender.to_wire().decode() if self.sender else "",
        }
        required = {
            "Nats-Msg-Id": self.id,
            "ce-specversion": "1.0",
            "ce-id": self.id,
            "ce-type": self.type,
            "ce-source": f"nabla/{self.source}",
            "ce-time": self.time.astimezone(UTC).isoformat(),
            "content-type": "application/json",
        }
        return required | {name: value for name, value in optional.items() if value}

    @classmethod
    def parse(cls, headers: Mapping[str, str]) -> Envelope:
        """Reads the headers.

        Raises:
            MalformedMessage: naming the header that is missing or not of its form, never its content.
        """
        sender = headers.get("nabla-principal")
        return cls(
            id=_read(headers, "ce-id", _text),
            type=_read(headers, "ce-type", _text),
            source=_read(headers, "ce-source", _text).removeprefix("nabla/"),
            time=_read(headers, "ce-time", _moment),
            object_id=headers.get("ce-subject", ""),
            team_id=headers.get("ce-team", ""),
            project_id=headers.get("ce-project", ""),
            revision=_read(headers, "ce-revision", int) if "ce-revision" in headers else 0,
            attempt=_read(headers, "ce-attempt", int) if "ce-attempt" in headers else 0,
            idempotency_key=headers.get("nabla-idempotency-key", ""),
            request_hash=headers.get("nabla-request-hash", ""),
            only_repeat="nabla-only-repeat" in headers,
            traceparent=headers.get("traceparent", ""),
            sender=Principal.from_wire(sender.encode()) if sender else None,
        )


def _read(headers: Mapping[str, str], name: str, form: Callable[[str], T]) -> T:
    try:
        return form(headers[name])
    except (KeyError, ValueError):
        raise MalformedMessage("Envelope", (name,)) from None


def _text(value: str) -> str:
    if not value:
        raise ValueError
    return value


def _moment(value: str) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError
    return moment
