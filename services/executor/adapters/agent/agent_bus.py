"""A node agent's way to the bus: plain nats-py, since an agent has one connection and no handlers.

It signs in as the user "agent", which may ship frames and reports and ask storage and registry, nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TypeVar

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client

from libs.common.clock import utc_now
from libs.common.contracts.envelope import ANSWER_REFUSED, STATUS_HEADER, Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import Principal
from libs.common.contracts.problem import Problem, refusal_from
from libs.common.contracts.subjects import stream_of, subject_for
from libs.common.errors import TooLarge, Unavailable
from libs.common.ids import new_id
from libs.common.telemetry import current_traceparent, span

USER = "agent"
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 5.0

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)


class AgentBus:
    """Connects when first needed and again whenever it must; never gives up by itself."""

    def __init__(self, url: str, seed: str) -> None:
        self._url = url
        self._seed = seed
        self._client: Client | None = None
        self._connecting = asyncio.Lock()

    async def close(self) -> None:
        if self._client:
            await self._client.close()

    async def publish(self, message: Message, envelope: Envelope) -> None:
        """Stores an event, command or frame, however long that takes. The same id again is stored once."""
        await self._publish(message.to_wire(), type(message), envelope)

    async def publish_body(self, kind: type[Message], body: bytes, envelope: Envelope) -> None:
        """The same for a message that is on the wire already."""
        await self._publish(body, kind, envelope)

    async def hint(self, subject: str, body: bytes) -> None:
        """Says something to whoever listens just now; nothing depends on it, and nothing waits for it."""
        client = self._client
        if client is not None and client.is_connected:
            with contextlib.suppress(nats.errors.Error, OSError):
                await client.publish(subject, body)

    async def _publish(self, body: bytes, kind: type[Message], envelope: Envelope) -> None:
        subject = subject_for(kind, team=envelope.team_id, object_id=envelope.object_id)
        stream, headers = stream_of(kind.ROUTE), envelope.headers()
        delay_s = FIRST_DELAY_S
        while True:
            try:
                client = await self._connected()
                await client.jetstream(timeout=5).publish(subject, body, stream=stream, headers=headers)
            except (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError) as error:
                log.warning("the bus does not take a message", extra={"subject": subject, "reason": repr(error)})
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, LONGEST_DELAY_S)
            else:
                return

    async def ask(self, message: Message, reply: type[M], team_id: str, *, key: str = "") -> M:
        """One request or query on the team's behalf, as the executor.

        Raises:
            Refusal: what the owner said; Unavailable when it is worth asking again with the same key.
        """
        route = message.ROUTE
        sender = Principal(kind="service", id="executor", team_id=team_id)
        with span(f"ask {route.name}"):
            return await self._ask(message, reply, sender, key)

    async def _ask(self, message: Message, reply: type[M], sender: Principal, key: str) -> M:
        route = message.ROUTE
        envelope = Envelope(
            id=new_id("event"),
            type=route.type,
            source="agent",
            time=utc_now(),
            team_id=sender.team_id,
            idempotency_key=key,
            traceparent=current_traceparent(),
            sender=sender,
        )
        try:
            client = await self._connected()
            subject = subject_for(type(message))
            answer = await client.request(subject, message.to_wire(), timeout=10, headers=envelope.headers())
        except nats.errors.MaxPayloadError:
            detail = f"What the {route.owner} service is asked is larger than a message on the bus may be."
            raise TooLarge("request_too_large", detail, "Use fewer or shorter names.") from None
        except (nats.errors.Error, OSError, TimeoutError) as error:
            detail = f"the {route.owner} service does not answer ({type(error).__name__})"
            raise Unavailable("service_silent", detail) from None
        if (answer.headers or {}).get(STATUS_HEADER) == ANSWER_REFUSED:
            raise refusal_from(Problem.model_validate_json(answer.data))
        return reply.from_wire(answer.data)

    async def _connected(self) -> Client:
        async with self._connecting:
            if self._client is None or self._client.is_closed:
                self._client = await nats.connect(
                    self._url.split(","),
                    name=USER,
                    nkeys_seed_str=self._seed or None,
                    inbox_prefix=f"_INBOX_{USER}",
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=1,
                    connect_timeout=5,
                    allow_reconnect=True,
                    error_cb=_note,
                )
            return self._client


async def _note(error: Exception) -> None:
    log.warning("bus: %r", error)


async def patiently_ask(
    bus: AgentBus,
    message: Message,
    reply: type[M],
    team_id: str,
    *,
    key: str = "",
    patience_s: float | None = None,
) -> M:
    """Asks again with the same key while the owner is away; for ever when `patience_s` is None.

    Raises:
        Refusal: the owner's own, or Unavailable when patience is over.
    """
    loop = asyncio.get_running_loop()
    deadline = None if patience_s is None else loop.time() + patience_s
    delay_s = FIRST_DELAY_S
    while True:
        try:
            return await bus.ask(message, reply, team_id, key=key)
        except Unavailable:
            if deadline is not None and loop.time() + delay_s > deadline:
                raise
        await asyncio.sleep(delay_s)
        delay_s = min(delay_s * 2, LONGEST_DELAY_S)
