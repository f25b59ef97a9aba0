"""Whose token is this? Asked of its owner, remembered for a minute, forgotten when it is revoked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from libs.common.contracts.messages import (
    AuthenticateAttempt,
    AuthenticateToken,
    Execution,
    Principal,
    TokenRevoked,
)
from libs.common.contracts.subjects import filter_for
from libs.common.errors import MalformedMessage, Unauthenticated, Unavailable
from libs.common.ids import secret_hash
from services.gateway.domain.tokens import ATTEMPT_TOKEN, USER_TOKEN, TokenCache
from services.gateway.ports import Closing, Hints, Owners

# Whom the gateway is before it knows who asks.
GATEWAY = Principal(kind="service", id="gateway", name="gateway")
LISTEN_S = 5.0

log = logging.getLogger(__name__)


class Authenticator:
    """Turns tokens into principals."""

    def __init__(self, owners: Owners, cache: TokenCache, clock: Callable[[], float]) -> None:
        self._owners = owners
        self._cache = cache
        self._clock = clock
        self._asking: dict[str, asyncio.Task[Principal]] = {}

    async def principal_of(self, token: str) -> Principal:
        """Who holds this token.

        Raises:
            Unauthenticated: nobody, or no longer.
            Unavailable: its owner is silent and the token was not seen lately.
        """
        if not token.startswith((USER_TOKEN, ATTEMPT_TOKEN)):
            raise refused("This is not a token of this platform.")
        token_hash = secret_hash(token)
        if found := self._cache.fresh(token_hash, self._clock()):
            return found
        try:
            return await self._ask_once(token_hash, token.startswith(ATTEMPT_TOKEN))
        except Unavailable:
            if known := self._cache.while_silent(token_hash, self._clock()):
                return known
            raise

    async def watch_revocations(self, hints: Hints) -> None:
        """Drops revoked tokens at once, for ever; one that is missed is dropped when its minute is over."""
        while True:
            try:
                async with hints.listen(filter_for(TokenRevoked)) as listener:
                    while True:
                        hint = await listener.next(LISTEN_S)
                        if hint:
                            self._hear_revocation(hint.body)
            except Unavailable:
                await asyncio.sleep(1)
            except Closing:
                return

    def forget(self, token: str) -> None:
        """Asks anew when this token comes next: it was revoked by this very gateway."""
        self._cache.forget(secret_hash(token))

    def _hear_revocation(self, body: bytes) -> None:
        try:
            self._cache.forget(TokenRevoked.from_wire(body).token_hash)
        except MalformedMessage as error:
            log.warning("a revocation could not be read", extra={"reason": str(error)})

    async def _ask_once(self, token_hash: str, is_attempt: bool) -> Principal:
        """One question for all who come with the same token meanwhile."""
        asking = self._asking.get(token_hash)
        if asking is None:
            asking = asyncio.create_task(self._ask(token_hash, is_attempt))
            self._asking[token_hash] = asking
            asking.add_done_callback(lambda _: self._asking.pop(token_hash, None))
        # Shielded: a client that goes away must not cancel the question of the others.
        return await asyncio.shield(asking)

    async def _ask(self, token_hash: str, is_attempt: bool) -> Principal:
        try:
            if is_attempt:
                question = AuthenticateAttempt(token_hash=token_hash)
                found = attempt_principal(await self._owners.ask(question, Execution, GATEWAY))
            else:
                found = await self._owners.ask(AuthenticateToken(token_hash=token_hash), Principal, GATEWAY)
        except Unauthenticated:
            self._cache.forget(token_hash)
            raise
        self._cache.keep(token_hash, found, self._clock())
        return found


def attempt_principal(execution: Execution) -> Principal:
    """A running attempt as the one who acts: it may touch its own job and project only."""
    return Principal(
        kind="attempt",
        id=execution.attempt_id,
        name=f"attempt {execution.number} of {execution.job_id}",
        team_id=execution.team_id,
        project_id=execution.project_id,
        job_id=execution.job_id,
        attempt=execution.number,
    )


def refused(detail: str) -> Unauthenticated:
    return Unauthenticated("token_invalid", detail, "Sign in again with `nabla login`, or send a valid token.")
