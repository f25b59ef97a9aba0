"""The cache of whose token is whose: short, bounded, dropped when a token is revoked."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from libs.common.contracts.messages import Principal

USER_TOKEN = "nbl_"
ATTEMPT_TOKEN = "nbla_"


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an answer counts.

    Args:
        user_s: seconds for a person's token.
        attempt_s: seconds for a running job's token; shorter, as it ends with the attempt.
        silent_s: seconds for which a known token still counts while its owner does not answer.
        entries: how many are kept.
    """

    user_s: float = 60.0
    attempt_s: float = 15.0
    silent_s: float = 600.0
    entries: int = 10_000


@dataclass(frozen=True, slots=True)
class _Entry:
    principal: Principal
    known_at: float


class TokenCache:
    """Principals by the hash of their token; times are seconds of any monotonic clock, given by the caller."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def fresh(self, token_hash: str, now: float) -> Principal | None:
        entry = self._entries.get(token_hash)
        return entry.principal if entry and now - entry.known_at < self._fresh_s(entry.principal) else None

    def while_silent(self, token_hash: str, now: float) -> Principal | None:
        """Also an older answer: for when its owner cannot be asked."""
        entry = self._entries.get(token_hash)
        return entry.principal if entry and now - entry.known_at < self._limits.silent_s else None

    def keep(self, token_hash: str, principal: Principal, now: float) -> None:
        self._entries[token_hash] = _Entry(principal, now)
        self._entries.move_to_end(token_hash)
        while len(self._entries) > self._limits.entries:
            self._entries.popitem(last=False)

    def forget(self, token_hash: str) -> None:
        self._entries.pop(token_hash, None)

    def _fresh_s(self, principal: Principal) -> float:
        return self._limits.attempt_s if principal.kind == "attempt" else self._limits.user_s
