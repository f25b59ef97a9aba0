"""Users, teams, memberships, tokens and sign-in codes in the database."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, or_, select

from libs.common.clock import from_us, to_us
from libs.common.contracts.messages import SignIn, Token, TokenPage
from services.registry.store.tables import MembershipRow, SignInRow, TeamRow, TokenRow, UserRow
from services.registry.store.unit import CatalogueUnit, table_of

USERS, TEAMS, MEMBERSHIPS = table_of(UserRow), table_of(TeamRow), table_of(MembershipRow)
TOKENS, SIGN_INS = table_of(TokenRow), table_of(SignInRow)


@dataclass(frozen=True, slots=True)
class Holder:
    """A token with the person who holds it."""

    token: Token
    token_hash: str
    user_name: str
    role: str
    team_name: str


@dataclass(frozen=True, slots=True)
class Signing:
    """Who a spent sign-in code was made for, and within which limits."""

    user_id: str
    team_id: str
    scopes: tuple[str, ...]


class Accounts:
    """The repository of accounts, within one unit of work."""

    def __init__(self, unit: CatalogueUnit) -> None:
        self._unit = unit

    async def holder_of(self, token_hash: str) -> Holder | None:
        """The token with this hash, if its user still belongs to its team."""
        query = (
            select(TOKENS, USERS.c.name.label("user_name"), MEMBERSHIPS.c.role, TEAMS.c.name.label("team_name"))
            .join(USERS, USERS.c.id == TOKENS.c.user_id)
            .join(TEAMS, TEAMS.c.id == TOKENS.c.team_id)
            .join(
                MEMBERSHIPS,
                and_(MEMBERSHIPS.c.user_id == TOKENS.c.user_id, MEMBERSHIPS.c.team_id == TOKENS.c.team_id),
            )
            .where(TOKENS.c.token_hash == token_hash)
        )
        row = await self._unit.one(query)
        if row is None or not hmac.compare_digest(row.token_hash.encode(), token_hash.encode()):
            return None
        return Holder(_token(row), row.token_hash, row.user_name, row.role, row.team_name)

    async def with_hash(self, token_hash: str) -> Token | None:
        """The token with this hash, valid or not."""
        row = await self._unit.one(select(TOKENS).where(TOKENS.c.token_hash == token_hash))
        return _token(row) if row else None

    async def add_token(self, token: Token, token_hash: str) -> None:
        assert token.created_at
        assert token.expires_at
        values = {
            "id": token.id,
            "token_hash": token_hash,
            "name": token.name,
            "user_id": token.user_id,
            "team_id": token.team_id,
            "scopes": " ".join(token.scopes),
            "created_us": to_us(token.created_at),
            "expires_us": to_us(token.expires_at),
            "revoked_us": None,
        }
        await self._unit.insert(TokenRow, values)

    async def token(self, token_id: str, team_id: str) -> tuple[Token, str] | None:
        """The token and its hash."""
        query = select(TOKENS).where(TOKENS.c.id == token_id, TOKENS.c.team_id == team_id)
        row = await self._unit.one(query)
        return (_token(row), row.token_hash) if row else None

    async def tokens(self, team_id: str, user_id: str | None, cursor: str, limit: int) -> TokenPage:
        """A page of the team's tokens, or of one user's in it."""
        query = select(TOKENS).where(TOKENS.c.team_id == team_id)
        if user_id is not None:
            query = query.where(TOKENS.c.user_id == user_id)
        page = await self._unit.page(query, TOKENS.c.id, cursor, limit)
        return TokenPage(items=tuple(map(_token, page.rows)), next_cursor=page.next_cursor)

    async def revoke(self, token_id: str, at: datetime) -> bool:
        """Whether it was this call that revoked the token."""
        living = and_(TOKENS.c.id == token_id, TOKENS.c.revoked_us.is_(None))
        result = await self._unit.execute(TOKENS.update().where(living).values(revoked_us=to_us(at)))
        return result.rowcount == 1

    async def extend(self, token_id: str, expires_at: datetime) -> None:
        longer = TOKENS.update().where(TOKENS.c.id == token_id).values(expires_us=to_us(expires_at))
        await self._unit.execute(longer)

    async def add_sign_in(self, sign_in: SignIn, signing: Signing, code_hash: str) -> None:
        assert sign_in.expires_at
        values = {
            "id": sign_in.id,
            "code_hash": code_hash,
            "user_id": signing.user_id,
            "team_id": signing.team_id,
            "scopes": " ".join(signing.scopes),
            "expires_us": to_us(sign_in.expires_at),
            "spent_us": None,
        }
        await self._unit.insert(SignInRow, values)

    async def knows_code(self, code_hash: str) -> bool:
        query = select(SIGN_INS.c.id).where(SIGN_INS.c.code_hash == code_hash)
        return await self._unit.one(query) is not None

    async def spend(self, code_hash: str, at: datetime) -> Signing | None:
        """Spends a living code, once whoever else tries at the same time; None when there is none to spend."""
        now_us = to_us(at)
        living = and_(SIGN_INS.c.code_hash == code_hash, SIGN_INS.c.spent_us.is_(None), SIGN_INS.c.expires_us > now_us)
        result = await self._unit.execute(SIGN_INS.update().where(living).values(spent_us=now_us))
        if result.rowcount != 1:
            return None
        row = await self._unit.one(select(SIGN_INS).where(SIGN_INS.c.code_hash == code_hash))
        return Signing(row.user_id, row.team_id, tuple(row.scopes.split()))

    async def role(self, user_id: str, team_id: str) -> str | None:
        """The user's role in the team; None for no member, and for a team that does not exist."""
        query = select(MEMBERSHIPS.c.role).where(MEMBERSHIPS.c.user_id == user_id, MEMBERSHIPS.c.team_id == team_id)
        row = await self._unit.one(query)
        return row.role if row else None

    async def user_named(self, name: str) -> str | None:
        row = await self._unit.one(select(USERS.c.id).where(USERS.c.name == name))
        return row.id if row else None

    async def team_named(self, name: str) -> str | None:
        row = await self._unit.one(select(TEAMS.c.id).where(TEAMS.c.name == name))
        return row.id if row else None

    async def add_user(self, user_id: str, name: str, at: datetime) -> None:
        await self._unit.insert(UserRow, {"id": user_id, "name": name, "created_us": to_us(at)})

    async def add_team(self, team_id: str, name: str, at: datetime) -> None:
        await self._unit.insert(TeamRow, {"id": team_id, "name": name, "created_us": to_us(at)})

    async def add_member(self, user_id: str, team_id: str, role: str, at: datetime) -> None:
        values = {"user_id": user_id, "team_id": team_id, "role": role, "created_us": to_us(at)}
        await self._unit.insert(MembershipRow, values)

    async def forget_over(self, before: datetime) -> None:
        """Drops codes and tokens that were over before then."""
        before_us = to_us(before)
        await self._unit.execute(SIGN_INS.delete().where(SIGN_INS.c.expires_us < before_us))
        over = or_(TOKENS.c.expires_us < before_us, TOKENS.c.revoked_us < before_us)
        await self._unit.execute(TOKENS.delete().where(over))


def _token(row: Any) -> Token:
    return Token(
        id=row.id,
        name=row.name,
        user_id=row.user_id,
        team_id=row.team_id,
        scopes=tuple(row.scopes.split()),
        created_at=from_us(row.created_us),
        expires_at=from_us(row.expires_us),
        revoked_at=from_us(row.revoked_us) if row.revoked_us is not None else None,
    )
