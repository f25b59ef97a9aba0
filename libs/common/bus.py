"""The bus: FastStream on NATS, with the settings that measurements asked for (each `Why` below names the trap).

Incoming: JetStream pushes events, commands and frames to one durable consumer per service and stream; requests and
queries come over core NATS to a queue group. Outgoing: only the outbox relay publishes stored messages; the bus
itself asks (`ask`) and sends unstored hints (`hint`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import nats.errors
import nats.js.errors
from faststream import AckPolicy
from faststream.exceptions import IncorrectState
from faststream.nats import JStream, NatsBroker, NatsMessage, NatsResponse
from faststream.nats.security import NatsNKey
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from sqlalchemy.exc import DBAPIError

from libs.common.clock import utc_now
from libs.common.contracts.envelope import (
    ANSWER_OK,
    ANSWER_REFUSED,
    STATUS_HEADER,
    Envelope,
)
from libs.common.contracts.message import Kind, Message
from libs.common.contracts.messages import Principal
from libs.common.contracts.problem import Problem, problem_of, refusal_from
from libs.common.contracts.subjects import (
    COMMANDS,
    DEAD_LETTERS,
    EVENTS,
    LOGS,
    dead_letter_subject,
    subject_for,
)
from libs.common.errors import MalformedMessage, NotFound, Unavailable
from libs.common.ids import new_id
from libs.common.inbox import Inbox
from libs.common.routing import Routes
from libs.common.store import is_outage, is_transient
from libs.common.telemetry import current_traceparent, meter, redact, span

WORKERS = 64
MAX_DELIVERIES = 20
LONGEST_DELAY_S = 60.0
# An outage ends for all at once, and nobody wants to wait a minute after it.
OUTAGE_DELAY_S = 5.0
MAX_DELIVERIES_IN_OUTAGE = int(3 * 86_400 / OUTAGE_DELAY_S)
STREAM_OF_KIND = {Kind.EVENT: EVENTS, Kind.COMMAND: COMMANDS, Kind.FRAME: LOGS}

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

_handled = meter().create_counter("nabla_messages_total", description="Messages handled, by type and outcome")


class Bus:
    """One service's connection.

    Args:
        service: its name; also the durable consumer, the queue group and the NATS user.
        url: `nats://host:port`, several separated by commas.
        seed: the nkey seed of this service's NATS user, or empty when the server asks for none.
    """

    def __init__(self, service: str, url: str, seed: str = "") -> None:
        self.service = service
        self.broker = NatsBroker(
            url.split(","),
            name=service,
            security=NatsNKey.from_seed(seed) if seed else None,
            inbox_prefix=f"_INBOX_{service}",
            # Why: after the default 60 attempts the client closes for good and the loop spins (trap 3).
            max_reconnect_attempts=-1,
            reconnect_time_wait=1,
            connect_timeout=5,
            ping_interval=10,
            graceful_timeout=20,
            # A closed connection never comes back; the supervisor starts the process again.
            closed_cb=_exit_unless_stopping(lambda: self._stopping),
            disconnected_cb=self._tell_disconnected,
            logger=None,
            # Why: its own decoding logs whole bodies, secrets included (trap 8); handlers get the raw message.
            apply_types=False,
            decoder=_undecoded,
        )
        self._stopping = False
        self._disconnected: list[Callable[[], None]] = []

    def on_disconnect(self, action: Callable[[], None]) -> None:
        """Calls `action` each time the connection is lost: before anything is published on the next one."""
        self._disconnected.append(action)

    async def _tell_disconnected(self) -> None:
        if self._stopping:
            return
        for action in self._disconnected:
            action()

    @property
    def client(self) -> Client:
        """The plain NATS client beneath.

        Raises:
            Unavailable: not connected yet.
        """
        try:
            return self.broker.connection
        except IncorrectState:
            raise Unavailable("bus_not_connected", "The message bus is not connected.", "Try again.") from None

    @property
    def jetstream(self) -> JetStreamContext:
        return self.client.jetstream(timeout=5)

    @property
    def connected(self) -> bool:
        try:
            return bool(self.client.is_connected)
        except Unavailable:
            return False

    async def start(self) -> None:
        await self.broker.start()

    async def stop(self) -> None:
        self._stopping = True
        await self.broker.stop()

    async def publish_stored(self, stream: str, subject: str, headers: dict[str, str], body: bytes) -> None:
        """Publishes to JetStream and waits until it is stored; repeating with the same id stores it once."""
        await self.jetstream.publish(subject, body, stream=stream, headers=headers, timeout=5)

    async def hint(self, subject: str, body: bytes) -> None:
        """Core publish: nobody need hear it. For live tails, never for state."""
        await self.client.publish(subject, body)

    async def ask(
        self,
        message: Message,
        reply: type[M],
        principal: Principal,
        *,
        key: str = "",
        request_hash: str = "",
        only_repeat: bool = False,
        service: str = "",
        timeout_s: float = 5.0,
    ) -> M:
        """Sends a request or a query to its owner and returns the answer.

        Args:
            key: the idempotency key of a request; on a timeout repeat with the same one.
            request_hash: of what was said under the key; empty when that is `message`.
            only_repeat: ask for what was answered under the key; NotFound when nothing was.
            service: whom to ask, for queries that every service answers.

        Raises:
            Refusal: what the owner said, or Unavailable when it does not answer.
        """
        route = message.ROUTE
        subject = subject_for(type(message), service=service)
        with span(f"ask {route.name}"):
            envelope = Envelope(
                id=new_id("event"),
                type=route.type,
                source=self.service,
                time=utc_now(),
                team_id=principal.team_id,
                idempotency_key=key,
                request_hash=request_hash,
                only_repeat=only_repeat,
                traceparent=current_traceparent(),
                sender=principal,
            )
            try:
                answer = await self.client.request(
                    subject, message.to_wire(), timeout=timeout_s, headers=envelope.headers()
                )
            except (
                nats.errors.TimeoutError,
                nats.errors.NoRespondersError,
                nats.errors.ConnectionClosedError,
                # We are leaving ourselves, and a loop asks once more.
                nats.errors.ConnectionDrainingError,
            ):
                raise _silent(service or route.owner, route.name) from None
        if (answer.headers or {}).get(STATUS_HEADER) == ANSWER_REFUSED:
            raise refusal_from(Problem.model_validate_json(answer.data))
        return reply.from_wire(answer.data)

    def serve(self, routes: Routes, inbox: Inbox[Any], further: Mapping[str, Inbox[Any]] | None = None) -> None:
        """Registers everything in `routes`; call before `start`. The consumers must have been provisioned.

        Args:
            inbox: of the service's first database.
            further: of the others, by the name that their routes give.
        """
        receiver = _Receiver(self, routes, {"": inbox} | dict(further or {}))
        for kind, stream in STREAM_OF_KIND.items():
            if routes.of_kind(kind):
                self._subscribe_stream(stream, receiver.deliverer(kind))
        for route in routes.of_kind(Kind.REQUEST, Kind.QUERY):
            self._subscribe_core(subject_for(route.message, service=self.service), receiver.answerer())

    def _subscribe_stream(self, stream: str, handle: Callable[[NatsMessage], Awaitable[None]]) -> None:
        subscriber = self.broker.subscriber(
            f"nabla.{stream.lower()}",
            queue=self.service,
            # Why: with declare=True a second service resets the stream's limits at start.
            stream=JStream(stream, declare=False),
            # Why: the default policy TERMs on an exception and the message is gone (trap 1).
            ack_policy=AckPolicy.MANUAL,
            max_workers=WORKERS,
            # Why: a reply_to header would publish the handler's result anywhere with our rights (trap 7).
            no_reply=True,
        )
        subscriber(handle)

    def _subscribe_core(self, subject: str, handle: Callable[[NatsMessage], Awaitable[NatsResponse]]) -> None:
        self.broker.subscriber(subject, queue=self.service, max_workers=WORKERS)(handle)


class _Receiver:
    """Turns raw messages into decoded ones, and errors into delays, dead letters or refusals."""

    def __init__(self, bus: Bus, routes: Routes, inboxes: Mapping[str, Inbox[Any]]) -> None:
        self._bus = bus
        self._routes = routes
        self._inboxes = inboxes

    def deliverer(self, kind: Kind) -> Callable[[NatsMessage], Awaitable[None]]:
        async def deliver(message: NatsMessage) -> None:
            raw = message.raw_message
            try:
                envelope = Envelope.parse(raw.headers or {})
                route = self._routes.find(kind, envelope.type)
                if route is None:
                    raise MalformedMessage("Envelope", (f"ce-type {envelope.type}",))
                await self._inboxes[route.database].apply(route, route.message.from_wire(raw.data), envelope)
            except Exception as error:
                await self._put_off(raw, error)
            else:
                _handled.add(1, {"type": envelope.type, "outcome": "applied"})
                await raw.ack()

        return deliver

    async def _put_off(self, raw: Msg, error: Exception) -> None:
        """Later for what may pass, at once to the dead letters for what will not.

        An outage is no fault of the message, however often it came: it waits until the outage is over. Of a peer or
        of the object store that is told by the handler alone, and one that says so of a single message for ever
        would keep its place among those that may be under way. So after about three days of trying the dead letters
        have it, for a person to judge: longer than a weekend, and before the stream drops an event. Tries are
        counted and not the message's age, as an old one may be replayed into an outage that has just begun.
        """
        deliveries = raw.metadata.num_delivered
        kind = (raw.headers or {}).get("ce-type", raw.subject)
        outage = is_outage(error) or (_is_outage_elsewhere(error) and deliveries < MAX_DELIVERIES_IN_OUTAGE)
        if outage or (_worth_repeating(error) and deliveries < MAX_DELIVERIES):
            log.warning("message put off", extra={"type": kind, "deliveries": deliveries, "reason": repr(error)})
            # Why: a plain nack comes back at once, 1,409 times a second.
            longest_s = OUTAGE_DELAY_S if outage else LONGEST_DELAY_S
            await raw.nak(delay=min(longest_s, 0.05 * 2 ** min(deliveries, 12)) + random.uniform(0, 0.1))
            return
        try:
            await self._keep_dead_letter(raw, error)
        except (nats.errors.Error, nats.js.errors.Error) as failure:
            # Not acknowledged, it comes again by itself, and then perhaps there is room.
            log.warning("dead letter not stored", extra={"type": kind, "reason": repr(failure)}, exc_info=error)
            return
        log.error("message dead-lettered", extra={"type": kind, "subject": raw.subject}, exc_info=error)
        _handled.add(1, {"type": kind, "outcome": "dead"})
        await raw.term()

    async def _keep_dead_letter(self, raw: Msg, error: Exception) -> None:
        """Returns when the dead letters have it; a repeat of the message is kept once."""
        headers = dict(raw.headers or {}) | {
            "nabla-original-subject": raw.subject,
            "nabla-error": redact(f"{type(error).__name__}: {error}").replace("\n", " ").replace("\r", " ")[:1000],
        }
        # Why: with the sequence alone, one without an id from another stream would pass for a repeat, and be lost.
        known_as = headers.get("ce-id") or f"{raw.metadata.stream}-{raw.metadata.sequence.stream}"
        headers["Nats-Msg-Id"] = f"{self._bus.service}-{known_as}"
        subject = dead_letter_subject(self._bus.service)
        await self._bus.publish_stored(DEAD_LETTERS, subject, headers, raw.data)

    def answerer(self) -> Callable[[NatsMessage], Awaitable[NatsResponse]]:
        async def answer(message: NatsMessage) -> NatsResponse:
            raw = message.raw_message
            try:
                envelope = Envelope.parse(raw.headers or {})
                status, body = await self._decide(raw, envelope)
            except Exception as error:
                problem = problem_of(_for_the_caller(error))
                if problem.status >= 500:
                    log.error("request failed", extra={"subject": raw.subject}, exc_info=error)
                _handled.add(1, {"type": raw.subject, "outcome": "refused"})
                return NatsResponse(problem.model_dump_json().encode(), headers={STATUS_HEADER: ANSWER_REFUSED})
            _handled.add(1, {"type": envelope.type, "outcome": "answered"})
            return NatsResponse(body, headers={STATUS_HEADER: status})

        return answer

    async def _decide(self, raw: Msg, envelope: Envelope) -> tuple[str, bytes]:
        kind = Kind(raw.subject.split(".")[1])
        route = self._routes.find(kind, envelope.type)
        if route is None or not raw.subject.endswith(envelope.type):
            raise MalformedMessage("Envelope", (f"ce-type {envelope.type}",))
        route.rule.check(envelope.principal, route.message.ROUTE.name)
        decoded = route.message.from_wire(raw.data)
        inbox = self._inboxes[route.database]
        # What a repeat would have to ask others may have changed or gone since it was answered.
        if kind is Kind.REQUEST and (route.prepare or envelope.only_repeat):
            if earlier := await inbox.given(route, decoded, envelope):
                return earlier.status, earlier.body
            if envelope.only_repeat:
                raise NotFound("not_answered", "Nothing was answered under this Idempotency-Key.")
        if route.prepare:
            envelope = replace(envelope, facts=await route.prepare(decoded, envelope))
        if kind is Kind.REQUEST:
            given = await inbox.apply(route, decoded, envelope)
            return given.status, given.body
        with span(f"{self._bus.service} {route.message.ROUTE.name}", envelope.traceparent):
            async with inbox.store.view() as view:
                found = await route.handler(decoded, view, envelope)
        return ANSWER_OK, found.to_wire() if found else b"{}"


async def _undecoded(message: NatsMessage) -> NatsMessage:
    return message


def _is_outage_elsewhere(error: Exception) -> bool:
    """Whether a peer, the bus or the object store is away."""
    return isinstance(error, (Unavailable, TimeoutError, nats.errors.Error))


def _worth_repeating(error: Exception) -> bool:
    """Whether another try may have another outcome: somebody else saved first, or is about to mend the rows."""
    return is_transient(error) or isinstance(error, DBAPIError)


def _for_the_caller(error: Exception) -> Exception:
    """Errors that may pass, as what a person can read and a program repeats."""
    if not isinstance(error, ConnectionError) and not is_transient(error):
        return error
    return Unavailable(
        "database_busy",
        "The service could not finish this: its database is busy or away.",
        "Repeat it with the same Idempotency-Key; if it stays, see `nabla doctor`.",
    )


def _silent(owner: str, name: str) -> Unavailable:
    return Unavailable(
        "service_silent",
        f"The {owner} service did not answer {name} in time; whether it was done is not known.",
        "Repeat it with the same Idempotency-Key.",
    )


def _exit_unless_stopping(stopping: Callable[[], bool]) -> Callable[[], Awaitable[None]]:
    async def closed() -> None:
        await asyncio.sleep(0)
        if not stopping():
            os._exit(70)

    return closed
