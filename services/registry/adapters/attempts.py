"""Attempts, asked of the executor over the bus."""

from __future__ import annotations

from libs.common.bus import Bus
from libs.common.contracts.messages import AuthenticateAttempt, Execution, Principal


class BusAttempts:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def of_token(self, token_hash: str) -> Execution:
        principal = Principal(kind="service", id=self._bus.service)
        return await self._bus.ask(AuthenticateAttempt(token_hash=token_hash), Execution, principal)
