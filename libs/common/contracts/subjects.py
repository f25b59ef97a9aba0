"""Where a message goes on NATS. The only place that spells a subject."""

from __future__ import annotations

from libs.common.contracts.message import VERSION, Kind, Message, Route

EVENTS = "EVT"
COMMANDS = "CMD"
LOGS = "LOG"
DEAD_LETTERS = "DEADLETTER"
SHARD = "0"
# The most that a stored message may have, headers and body together; above it are S3 and presigned URLs.
MAX_MESSAGE_BYTES = 262_144


def subject_for(message: type[Message], *, team: str = "", object_id: str = "", service: str = "") -> str:
    """The subject to publish `message` on.

    Args:
        team: needed for events and log frames.
        object_id: the job, for log frames.
        service: whom to ask, for queries that each service answers.
    """
    route = message.ROUTE
    match route.kind:
        case Kind.EVENT:
            return f"nabla.evt.{team}.{route.type}"
        case Kind.COMMAND:
            return f"nabla.cmd.{route.owner}.{SHARD}.{route.type}"
        case Kind.FRAME:
            return f"nabla.log.{team}.{object_id}"
        case Kind.REQUEST | Kind.QUERY:
            return f"nabla.{route.kind.value}.{service or route.owner}.{route.type}"


def filter_for(message: type[Message]) -> str:
    """The subject, with wildcards, that every publication of `message` matches."""
    return subject_for(message, team="*", object_id="*")


def team_events(team: str, aggregate: str = "") -> str:
    """The subject, with a wildcard, of all events of one team, or of one kind of object in it."""
    return f"nabla.evt.{team}.{aggregate}.>" if aggregate else f"nabla.evt.{team}.>"


def tail_subject(team: str, job_id: str) -> str:
    """Core NATS subject on which storage repeats log lines with their final sequence, for live followers."""
    return f"nabla.tail.{team}.{job_id}"


def dead_letter_subject(service: str) -> str:
    return f"nabla.dlq.{service}"


def delivery_subject(service: str, stream: str) -> str:
    """Where JetStream pushes this service's messages of one stream."""
    return f"nabla.dlv.{service}.{stream.lower()}"


def stream_of(route: Route) -> str:
    """The stream that stores messages of this route; requests and queries are not stored."""
    return {Kind.EVENT: EVENTS, Kind.COMMAND: COMMANDS, Kind.FRAME: LOGS}[route.kind]


__all__ = [
    "COMMANDS",
    "DEAD_LETTERS",
    "EVENTS",
    "LOGS",
    "MAX_MESSAGE_BYTES",
    "SHARD",
    "VERSION",
    "dead_letter_subject",
    "delivery_subject",
    "filter_for",
    "stream_of",
    "subject_for",
    "tail_subject",
    "team_events",
]
