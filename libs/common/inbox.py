"""Exactly one effect per message, and one commit for many: the only way into a service's state from the bus.

Messages that wait together are applied in one transaction, each with its inbox row or idempotency key, and are
acknowledged after the commit. A crash at any point either repeats a message that the inbox then recognises, or
loses an answer that the sender asks for again under the same key.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic

from libs.common.contracts.envelope import ANSWER_CREATED, ANSWER_DUPLICATE, Envelope
from libs.common.contracts.message import Kind, Message
from libs.common.errors import Conflict, NablaError
from libs.common.faults import crash_point
from libs.common.routing import Route
from libs.common.store import Store, U, UnitOfWork, is_disk_full, is_transient
from libs.common.telemetry import span

BATCH = 100


@dataclass(frozen=True, slots=True)
class Answer:
    status: str
    body: bytes


@dataclass(slots=True)
class _Waiting:
    route: Route
    message: Message
    envelope: Envelope
    done: asyncio.Future[Answer]


class Inbox(Generic[U]):
    """Applies messages to one store, in the order in which they came, up to BATCH a commit."""

    def __init__(self, store: Store[U], service: str) -> None:
        self._store = store
        self._service = service
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._committed: list[Callable[[], None]] = []

    @property
    def store(self) -> Store[U]:
        return self._store

    def after_commit(self, action: Callable[[], None]) -> None:
        """Calls `action` after each commit: how background loops learn at once that there may be work."""
        self._committed.append(action)

    async def apply(self, route: Route, message: Message, envelope: Envelope) -> Answer:
        """Waits until the message's effect is committed.

        Raises:
            whatever its handler raised; nothing of its effect is kept then.
        """
        waiting = _Waiting(route, message, envelope, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.done

    async def given(self, route: Route, message: Message, envelope: Envelope) -> Answer | None:
        """The answer to this request, if it was given before.

        Raises:
            Conflict: its key was used for another request.
        """
        async with self._store.view() as view:
            return await _given(view, route, message, envelope)

    async def run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < BATCH and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._commit(batch)

    async def _commit(self, batch: list[_Waiting]) -> None:
        try:
            outcomes = await self._apply_all(batch)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            outcomes = [error] * len(batch)
        else:
            for action in self._committed:
                action()
            crash_point(f"{self._service}.after_commit_before_ack")
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if waiting.done.done():
                continue
            if isinstance(outcome, Answer):
                waiting.done.set_result(outcome)
            else:
                waiting.done.set_exception(outcome)

    async def _apply_all(self, batch: list[_Waiting]) -> list[Answer | Exception]:
        """Bare, which is quick; when a message is refused, again with a savepoint for each, so that it goes alone."""
        try:
            return await self._store.run(lambda unit: self._apply_bare(unit, batch))
        except Exception as error:
            if _fails_all(error):
                raise
            if len(batch) == 1:
                return [error]
        return await self._store.run(lambda unit: self._apply_apart(unit, batch))

    async def _apply_bare(self, unit: U, batch: list[_Waiting]) -> list[Answer | Exception]:
        outcomes: list[Answer | Exception] = []
        for waiting in batch:
            with _telling_the_cause():
                outcomes.append(await self._apply_one(unit, waiting))
        return outcomes

    async def _apply_apart(self, unit: U, batch: list[_Waiting]) -> list[Answer | Exception]:
        outcomes: list[Answer | Exception] = []
        for waiting in batch:
            emitted = len(unit.outgoing)
            try:
                with _telling_the_cause():
                    async with unit.session.begin_nested():
                        outcomes.append(await self._apply_one(unit, waiting))
            except Exception as error:
                if _fails_all(error):
                    # A stale read cannot be mended inside the transaction that has it: all is repeated.
                    raise
                del unit.outgoing[emitted:]
                unit.session.expunge_all()
                outcomes.append(error)
        return outcomes

    async def _apply_one(self, unit: U, waiting: _Waiting) -> Answer:
        envelope, route = waiting.envelope, waiting.route
        name = f"{self._service} {route.message.ROUTE.name}"
        with span(name, envelope.traceparent, object=envelope.object_id, team=envelope.team_id):
            answer = await self._effect(unit, waiting)
            await unit.session.flush()
            # What one message has loaded is stale for the next, as saves go past the session.
            unit.session.expunge_all()
            return answer

    async def _effect(self, unit: U, waiting: _Waiting) -> Answer:
        envelope, route = waiting.envelope, waiting.route
        if route.message.ROUTE.kind is Kind.REQUEST:
            return await _answer_once(unit, waiting)
        if not route.repeatable and not await unit.mark_applied(envelope.id):
            return Answer(ANSWER_DUPLICATE, b"")
        await route.handler(waiting.message, unit, envelope)
        return Answer(ANSWER_CREATED, b"")


def _fails_all(error: BaseException) -> bool:
    """Whether the transaction is gone, and with it every message in it."""
    return is_transient(error) or is_disk_full(error)


@contextmanager
def _telling_the_cause() -> Iterator[None]:
    """Raises what ended the transaction instead of what was heard of it.

    SQLite ends it on a full disk, and what is heard is that the savepoint is not there: an error that nobody repeats,
    for messages that have done nothing wrong.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause and not _fails_all(cause):
            cause = cause.__context__
        if cause is None or cause is error:
            raise
        raise cause from None


async def _answer_once(unit: UnitOfWork, waiting: _Waiting) -> Answer:
    """The handler's answer, or the one given earlier to the same principal under the same key."""
    envelope, route = waiting.envelope, waiting.route
    if given := await _given(unit, route, waiting.message, envelope):
        return given
    reply = await route.handler(waiting.message, unit, envelope)
    operation, key = route.message.ROUTE.name, envelope.idempotency_key
    if reply is None:
        raise NablaError(f"{operation} gave no answer")
    body = reply.to_wire()
    if key and not route.repeatable:
        request_hash = _hash_of(waiting.message, envelope)
        await unit.keep_answer(_asker(envelope), operation, key, request_hash, body)
    return Answer(ANSWER_CREATED, body)


async def _given(unit: UnitOfWork, route: Route, message: Message, envelope: Envelope) -> Answer | None:
    key = envelope.idempotency_key
    found = await unit.given_answer(_asker(envelope), route.message.ROUTE.name, key) if key else None
    if found is None:
        return None
    request_hash, body = found
    if request_hash != _hash_of(message, envelope):
        raise Conflict(
            "idempotency_key_reused",
            "This Idempotency-Key was used before for a different request.",
            "Use a fresh key for each new request.",
        )
    return Answer(ANSWER_DUPLICATE, body)


def _asker(envelope: Envelope) -> str:
    return f"{envelope.principal.kind}:{envelope.principal.id}"


def _hash_of(message: Message, envelope: Envelope) -> str:
    """What a client repeats is its own words; the gateway may have found other names for them meanwhile."""
    return envelope.request_hash or hashlib.sha256(message.to_wire()).hexdigest()
