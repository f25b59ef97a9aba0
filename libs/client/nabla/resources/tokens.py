"""API tokens: scoped, expiring, and shown once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nabla.decoding import decode
from nabla.objects import Token
from nabla.resources.base import Resource, segment


class Tokens(Resource):
    def create(self, name: str, scopes: Sequence[str] = (), lifetime_s: float = 90 * 86400.0) -> Token:
        """The answer carries the secret, this once. No scopes: all that the maker may do."""
        body = {"name": name, "scopes": list(scopes), "lifetime_s": lifetime_s}
        return decode(Token, self._transport.post("/tokens", body))

    def list(self, limit: int | None = None) -> Iterator[Token]:
        return self._paged("/tokens", Token, {}, limit)

    def revoke(self, token_id: str) -> Token:
        return decode(Token, self._transport.request("DELETE", f"/tokens/{segment(token_id)}"))
