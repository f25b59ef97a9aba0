"""Asks owners over the bus."""

from __future__ import annotations

from functools import partial

import nats.errors

from libs.common.bus import Bus
from libs.common.contracts.message import Kind, Message
from libs.common.contracts.messages import Principal
from libs.common.errors import TooLarge, Unavailable
from services.gateway.ports import M, Once


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
        once: Once | None = None,
        service: str = "",
        timeout_s: float = 5.0,
    ) -> M:
        words = once or Once("")
        ask = partial(
            self._bus.ask,
            message,
            reply,
            principal,
            key=words.key,
            request_hash=words.request_hash,
            service=service,
            timeout_s=timeout_s,
        )
        try:
            return await ask()
        except nats.errors.MaxPayloadError:
            raise TooLarge("message_too_large", "The request is larger than the bus carries.", "Send less.") from None
        except Unavailable as silence:
            # Without a key a repeat of a request could take effect twice.
            if silence.code != "service_silent" or service or not (words.key or message.ROUTE.kind is Kind.QUERY):
                raise
        return await ask()

    async def earlier(self, message: Message, reply: type[M], principal: Principal, once: Once) -> M:
        return await self._bus.ask(
            message, reply, principal, key=once.key, request_hash=once.request_hash, only_repeat=True
        )
