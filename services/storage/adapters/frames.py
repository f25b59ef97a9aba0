"""How far the bus's log frames are settled, asked of JetStream."""

from __future__ import annotations

import nats.errors

from libs.common.bus import Bus
from libs.common.contracts.subjects import LOGS
from libs.common.errors import Unavailable


class BusFrames:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def newest_and_settled(self) -> tuple[int, int]:
        jetstream = self._bus.jetstream
        try:
            newest = (await jetstream.stream_info(LOGS)).state.last_seq
            consumer = await jetstream.consumer_info(LOGS, self._bus.service)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            reason = f"The message bus does not tell which log frames it holds: {error!r}."
            raise Unavailable("bus_silent", reason, "Try again.") from None
        if consumer.num_pending == 0 and consumer.num_ack_pending == 0:
            # Also when frames grew too old before they came to us: those are never settled.
            return newest, newest
        return newest, consumer.ack_floor.stream_seq if consumer.ack_floor else 0
