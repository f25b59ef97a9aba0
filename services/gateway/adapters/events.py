"""Reads the event stream for one client at a time, in order and without a gap.

Each reader has an ephemeral consumer without acks, in the server's memory. Such a consumer may vanish (the server
started again) or run ahead of us (our queue was full): both are seen by its own numbering, and a new one begins
after the last event that was given out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from libs.common.bus import Bus
from libs.common.contracts.message import VERSION
from libs.common.contracts.subjects import EVENTS, team_events
from libs.common.errors import Unavailable
from services.gateway.ports import StoredEvent

QUIET_S = 5.0
PENDING = 1024


class NatsEventLog:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def newest(self) -> int:
        try:
            return (await self._bus.jetstream.stream_info(EVENTS)).state.last_seq
        except (nats.errors.Error, nats.js.errors.Error) as error:
            detail = f"The event stream does not answer: {error!r}."
            raise Unavailable("events_unavailable", detail, "Try again.") from error

    async def read(self, team_id: str, after: int) -> AsyncGenerator[StoredEvent | None, None]:
        while True:
            try:
                async with aclosing(self._read_one_consumer(team_id, after)) as events:
                    async for event in events:
                        after = event.sequence if event else after
                        yield event
            except (nats.errors.Error, nats.js.errors.Error, Unavailable):
                yield None
                await asyncio.sleep(1)

    async def _read_one_consumer(self, team_id: str, after: int) -> AsyncGenerator[StoredEvent | None, None]:
        """Until this consumer is found to be gone or ahead of us."""
        jetstream = self._bus.jetstream
        subscription = await jetstream.subscribe(
            team_events(team_id), stream=EVENTS, config=_config(after), pending_msgs_limit=PENDING
        )
        received = 0
        try:
            while True:
                try:
                    message = await subscription.next_msg(QUIET_S)
                except nats.errors.TimeoutError:
                    if await _ahead(subscription, received):
                        return
                    yield None
                    continue
                if message.metadata.sequence.consumer != received + 1:
                    return
                received += 1
                yield _stored(message)
        finally:
            await asyncio.shield(_leave(subscription))


def _config(after: int) -> ConsumerConfig:
    return ConsumerConfig(
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=after + 1,
        ack_policy=AckPolicy.NONE,
        mem_storage=True,
        num_replicas=1,
        inactive_threshold=30.0,
    )


async def _ahead(subscription: JetStreamContext.PushSubscription, received: int) -> bool:
    """Whether the server has sent more than came here."""
    try:
        info = await subscription.consumer_info()
    except nats.js.errors.NotFoundError:
        return True
    delivered = info.delivered.consumer_seq if info.delivered else 0
    return delivered > received and subscription.pending_msgs == 0


async def _leave(subscription: JetStreamContext.PushSubscription) -> None:
    try:
        await subscription.unsubscribe()
    except nats.errors.Error:
        return


def _stored(message: Msg) -> StoredEvent:
    headers = message.headers or {}
    return StoredEvent(
        sequence=message.metadata.sequence.stream,
        type=headers.get("ce-type", "").removesuffix(f".{VERSION}"),
        object_id=headers.get("ce-subject", ""),
        project_id=headers.get("ce-project", ""),
        body=message.data,
    )
