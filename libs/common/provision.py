"""Streams and consumers as they must be: written by one step of the installation, compared by everyone else.

Services never create a stream: FastStream and nats-py would silently reset another's limits, or run with older
settings than the code says (both measured).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import NotFoundError

from libs.common.contracts.message import Kind
from libs.common.contracts.subjects import (
    COMMANDS,
    DEAD_LETTERS,
    EVENTS,
    LOGS,
    MAX_MESSAGE_BYTES,
    SHARD,
    delivery_subject,
    filter_for,
)
from libs.common.routing import Routes

DAY_S = 86_400.0
# What a dead letter says more than its message: where it came from and what was wrong with it.
EPITAPH_BYTES = 8_192


def streams(replicas: int = 1) -> tuple[StreamConfig, ...]:
    """The four streams. Full means refused, never forgotten. Log frames go as soon as storage has them: what is there
    is what storage has not taken yet, and where that is too much, lines wait in the spools of their nodes."""
    shared: dict[str, Any] = {
        "storage": StorageType.FILE,
        "num_replicas": replicas,
        "max_msg_size": MAX_MESSAGE_BYTES,
        "duplicate_window": 600.0,
        "discard": DiscardPolicy.NEW,
    }
    return (
        StreamConfig(name=EVENTS, subjects=["nabla.evt.>"], max_age=14 * DAY_S, max_bytes=4 << 30, **shared),
        StreamConfig(
            name=COMMANDS,
            subjects=["nabla.cmd.>"],
            retention=RetentionPolicy.WORK_QUEUE,
            max_bytes=2 << 30,
            **shared,
        ),
        StreamConfig(
            name=LOGS,
            subjects=["nabla.log.*.*"],
            retention=RetentionPolicy.WORK_QUEUE,
            max_bytes=4 << 30,
            **shared,
        ),
        StreamConfig(
            name=DEAD_LETTERS,
            subjects=["nabla.dlq.*"],
            max_bytes=1 << 30,
            **(shared | {"max_msg_size": MAX_MESSAGE_BYTES + EPITAPH_BYTES}),
        ),
    )


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Consumer:
    stream: str
    config: ConsumerConfig


def consumers(routes: Routes) -> tuple[Consumer, ...]:
    """The durable push consumers of one service: one for each stream that it listens to."""
    wanted = (
        (EVENTS, sorted(filter_for(route.message) for route in routes.of_kind(Kind.EVENT))),
        (COMMANDS, [f"nabla.cmd.{routes.service}.{SHARD}.>"] if routes.of_kind(Kind.COMMAND) else []),
        (LOGS, ["nabla.log.*.*"] if routes.of_kind(Kind.FRAME) else []),
    )
    return tuple(Consumer(stream, _consumer(routes.service, stream, filters)) for stream, filters in wanted if filters)


def _consumer(service: str, stream: str, filters: list[str]) -> ConsumerConfig:
    return ConsumerConfig(
        durable_name=service,
        deliver_subject=delivery_subject(service, stream),
        deliver_group=service,
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=30.0,
        # Deliveries count restarts too: the bus itself decides when enough is enough, by looking at the error.
        max_deliver=-1,
        max_ack_pending=256,
        filter_subject=filters[0] if len(filters) == 1 else None,
        filter_subjects=filters if len(filters) > 1 else None,
    )


async def provision_streams(jetstream: JetStreamContext, replicas: int = 1) -> None:
    """Creates the streams or brings them to what the code says."""
    for config in streams(replicas):
        assert config.name
        try:
            present = await jetstream.stream_info(config.name)
        except NotFoundError:
            await jetstream.add_stream(config)
            continue
        if present.config.retention != config.retention:
            await _make_anew(jetstream, config)
        else:
            await jetstream.update_stream(config)


async def _make_anew(jetstream: JetStreamContext, config: StreamConfig) -> None:
    """How a stream keeps its messages cannot be changed. One that an older release made stays as it is as long as
    somebody has not taken all that it holds."""
    assert config.name
    waiting = [each for each in await jetstream.consumers_info(config.name) if each.num_pending or each.num_ack_pending]
    if waiting:
        log.warning("stream is changed at a later start", extra={"stream": config.name, "waits_for": len(waiting)})
        return
    await jetstream.delete_stream(config.name)
    await jetstream.add_stream(config)


async def provision_consumers(jetstream: JetStreamContext, routes: Routes) -> None:
    """Creates the service's consumers or brings them to what the code says; harmless when all is well."""
    for consumer in consumers(routes):
        await jetstream.add_consumer(consumer.stream, consumer.config)
