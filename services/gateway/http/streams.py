"""Server-sent events: a job's log and states, and the team's objects as they change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from sse_starlette import EventSourceResponse, ServerSentEvent

from libs.common.contracts.message import Kind, Message
from libs.common.contracts.messages import MESSAGES, Deployment, LogLine, Principal
from libs.common.errors import Invalid, MalformedMessage, Refusal, Unavailable
from libs.common.routing import Rule
from services.gateway.authentication import Authenticator
from services.gateway.domain.event_filter import EventFilter, limited_to, parse_types
from services.gateway.following import End, Lines, State, Step, Unfinished
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import API, Caller, Id, Token, Wired, Word
from services.gateway.http.projects import resolve_id
from services.gateway.ports import Closing, EventLog, StoredEvent

router = APIRouter(prefix=API, responses=RESPONSES)

KEEP_ALIVE_S = 15
# A client that takes nothing for so long is cut off; it resumes by the last id it has seen.
SEND_TIMEOUT_S = 30.0
# How often an open stream looks whether its token still counts.
RECHECK_S = 30.0
FOLLOW_EVENTS = Rule(role="viewer", scope="read", attempts=True)
EVENTS = {
    message.ROUTE.name: message
    for message in MESSAGES
    if hasattr(message, "ROUTE") and message.ROUTE.kind is Kind.EVENT
}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "A stream."}}

_quoted = json.JSONEncoder(ensure_ascii=False).encode
LastId = Annotated[str | None, Header(alias="Last-Event-ID", max_length=20)]


@router.get(
    "/jobs/{job_id}/logs/stream",
    tags=["jobs"],
    summary="Follow a job: events line, unfinished, state and, at the end, end",
    response_class=EventSourceResponse,
    responses=STREAM,
)
async def stream_log(
    *,
    job_id: Id,
    token: Token,
    caller: Caller,
    parts: Wired,
    after: Annotated[int, Query(ge=-100_000, description="Negative: the last so many lines first.")] = 0,
    skip_behind: Annotated[int, Query(ge=0, description="Skip lines when so many behind; 0: never.")] = 0,
    last_event_id: LastId = None,
) -> EventSourceResponse:
    start = sequence_from(last_event_id)
    job = await parts.follower.job(caller, job_id)
    steps = parts.follower.follow(caller, job, after if start is None else start, skip_behind)
    return _response(_while_valid(_log_events(steps), parts.authenticator, token))


@router.get(
    "/events/stream",
    tags=["events"],
    summary="Follow the team's objects as they change",
    response_class=EventSourceResponse,
    responses=STREAM,
)
async def stream_events(
    *,
    token: Token,
    caller: Caller,
    parts: Wired,
    project_id: Word = "",
    object_id: Word = "",
    types: Annotated[Word, Query(examples=["job.,model."])] = "",
    last_event_id: LastId = None,
) -> EventSourceResponse:
    FOLLOW_EVENTS.check(caller, "event.follow")
    project = await resolve_id(parts.owners, caller, project_id)
    wish = limited_to(caller, EventFilter(project, object_id, parse_types(types)))
    last = sequence_from(last_event_id)
    after = await parts.event_log.newest() if last is None else last
    events = _object_events(parts.event_log, caller, after, wish)
    return _response(_while_valid(events, parts.authenticator, token))


def sequence_from(last_event_id: str | None) -> int | None:
    """Where to resume.

    Raises:
        Invalid: the id is not one that a stream of ours gave.
    """
    if not last_event_id:
        return None
    if not last_event_id.isascii() or not last_event_id.isdigit() or int(last_event_id) >= 2**63:
        raise Invalid("bad_last_event_id", "Last-Event-ID is not an id of this stream.", "Start without it.")
    return int(last_event_id)


def _response(events: AsyncGenerator[bytes, None]) -> EventSourceResponse:
    return EventSourceResponse(_until_closing(events), ping=KEEP_ALIVE_S, send_timeout=SEND_TIMEOUT_S, sep="\n")


async def _until_closing(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Ends the stream, instead of breaking it, when the gateway stops or its object is gone."""
    async with aclosing(events):
        try:
            async for chunk in events:
                if chunk:
                    yield chunk
        except (Closing, Refusal):
            return


async def _while_valid(
    events: AsyncGenerator[bytes, None], authenticator: Authenticator, token: str
) -> AsyncGenerator[bytes, None]:
    """Passes events on as long as the token counts: revoking it ends its open streams too."""
    loop = asyncio.get_running_loop()
    looked_at = loop.time()
    async with aclosing(events):
        async for chunk in events:
            if loop.time() - looked_at > RECHECK_S:
                looked_at = loop.time()
                with suppress(Unavailable):
                    await authenticator.principal_of(token)
            yield chunk


async def _log_events(steps: AsyncGenerator[Step, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(steps):
        async for step in steps:
            yield _log_event(step)


def _log_event(step: Step) -> bytes:
    match step:
        case Lines(lines):
            return "".join(map(_line_event, lines)).encode("utf-8", "replace")
        case Unfinished(lines):
            return b"".join(_encoded("unfinished", line) for line in lines)
        case State(job):
            return _encoded("state", job)
        case End(job):
            return _encoded("end", job)


def _line_event(line: LogLine) -> str:
    """Written by hand: a flood has 100,000 of them in a second, and through the message class each takes ten times
    as long."""
    at = f'"{line.at.isoformat().replace("+00:00", "Z")}"' if line.at else "null"
    head = f'{{"sequence":{line.sequence},"at":{at},"stream":{_quoted(line.stream)},"text":{_quoted(line.text)}'
    rest = f'"attempt":{line.attempt},"rank":{line.rank},"cut":{"true" if line.cut else "false"}}}'
    return f"id: {line.sequence}\nevent: line\ndata: {head},{rest}\n\n"


async def _object_events(
    event_log: EventLog, caller: Principal, after: int, wish: EventFilter
) -> AsyncGenerator[bytes, None]:
    # An id without data is no event, but it is kept: who is cut off before the first event misses nothing either.
    yield f"id: {after}\n\n".encode()
    async with aclosing(event_log.read(caller.team_id, after)) as events:
        async for event in events:
            if event and wish.admits(event.type, event.object_id, event.project_id):
                yield object_event(event)
            else:
                yield b""


def object_event(event: StoredEvent) -> bytes:
    """One stored event as clients see it: JSON of the API, without what only an owner may hand out."""
    message = EVENTS.get(event.type)
    if message is None:
        return b""
    try:
        body = message.from_wire(event.body)
    except MalformedMessage:
        return b""
    deployment = getattr(body, "deployment", None)
    if isinstance(deployment, Deployment):
        body = body.model_copy(update={"deployment": deployment.model_copy(update={"endpoint_token": ""})})
    return _encoded(event.type, body, event.sequence)


def _encoded(name: str, message: Message, sequence: int | None = None) -> bytes:
    number = None if sequence is None else str(sequence)
    return ServerSentEvent(message.model_dump_json(), event=name, id=number, sep="\n").encode()
