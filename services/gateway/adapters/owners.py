"""Asks owners over the bus."""

from __future__ import annotations

from functools import partial

import nats.errors

from libs.common.bus import Bus
from libs.common.contracts.message import Message
from libs.common.contracts.messages import Principal
from libs.common.errors import TooLarge, Unavailable
from services.gateway.ports import M


class BusOwners:
    """The bus, and one repeat with the same key when the owner was silent: it may have just started again."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def ask(
        self,
        message: Message,
        reply: type[M],
        principal: Principal,
        *,
        key: str = "",
        service: str = "",
        timeout_s: float = 5.0,
    ) -> M:
        ask = partial(self._ask, message, reply, principal, key=key, service=service, timeout_s=timeout_s)
        try:
            return await ask()
        except Unavailable as silence:
            # Without a key a repeat of a request could take effect twice.
            if silence.code != "service_silent" or service or not _repeatable(message, key):
                raise
        return await ask()

    async def _ask(
        self, message: Message, reply: type[M], principal: Principal, *, key: str, service: str, timeout_s: float
    ) -> M:
        try:
            return await self._bus.ask(message, reply, principal, key=key, service=service, timeout_s=timeout_s)
        except nats.errors.MaxPayloadError:
            raise TooLarge("message_too_large", "The request is larger than the bus carries.", "Send less.") from None


def _repeatable(message: Message, key: str) -> bool:
    return bool(key) or message.ROUTE.kind.value == "qry"
