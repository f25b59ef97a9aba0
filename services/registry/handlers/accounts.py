"""Tokens, sign-in codes and the first account."""

from __future__ import annotations

from datetime import timedelta

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    AuthenticateToken,
    CreateSignIn,
    CreateToken,
    ListTokens,
    Principal,
    RedeemSignIn,
    RevokeToken,
    SignIn,
    SignOut,
    Token,
    TokenPage,
    TokenRevoked,
)
from libs.common.errors import Conflict, NotFound
from libs.common.ids import is_id, new_id
from libs.common.store import Store
from services.registry.domain import accounts as rules
from services.registry.store import RegistryUnit
from services.registry.store.accounts import Signing

# Who leads the first team runs the installation.
FIRST_USER, FIRST_TEAM = "admin", "main"
LEADERS = frozenset({"admin", "owner"})


async def authenticate_token(message: AuthenticateToken, unit: RegistryUnit, _call: Envelope) -> Principal:
    """Whose token this is. Unknown, expired and revoked ones get one and the same answer."""
    known_form = rules.is_hash(message.token_hash)
    holder = await unit.accounts.holder_of(message.token_hash) if known_form else None
    token = holder.token if holder else None
    if not holder or not token or not token.expires_at:
        raise rules.no_valid_token()
    if not rules.is_live(token.expires_at, token.revoked_at, unit.now):
        raise rules.no_valid_token()
    return Principal(
        kind="user",
        id=token.user_id,
        name=holder.user_name,
        team_id=token.team_id,
        role=holder.role,
        scopes=token.scopes,
        operator=holder.team_name == FIRST_TEAM and holder.role in LEADERS,
    )


async def create_token(message: CreateToken, unit: RegistryUnit, call: Envelope) -> Token:
    """A further token of the caller, with no more rights than the one that asks."""
    principal = call.principal
    scopes = rules.granted_scopes(message.scopes, principal.scopes)
    life = rules.token_life(message.lifetime_s)
    name = rules.checked_label(message.name)
    return await _add_token(unit, Signing(principal.id, principal.team_id, scopes), name, life, message.token_hash)


async def revoke_token(message: RevokeToken, unit: RegistryUnit, call: Envelope) -> Token:
    """Ends a token: one's own, or as admin any of the team. Ending it again changes nothing."""
    principal = call.principal
    known_form = is_id("token", message.token_id)
    found = await unit.accounts.token(message.token_id, principal.team_id) if known_form else None
    if found is None or (found[0].user_id != principal.id and not _leads(principal)):
        raise NotFound("token_not_found", "There is no such token.", "List them at /api/v1/tokens.")
    return await _revoke(unit, *found)


async def list_tokens(message: ListTokens, unit: RegistryUnit, call: Envelope) -> TokenPage:
    """One's own tokens, or as admin all of the team's."""
    principal = call.principal
    whose = None if _leads(principal) else principal.id
    return await unit.accounts.tokens(principal.team_id, whose, message.cursor, message.limit)


async def create_sign_in(message: CreateSignIn, unit: RegistryUnit, call: Envelope) -> SignIn:
    """A code with which a browser becomes the caller, once, within ten minutes and the limits of the present token."""
    principal = call.principal
    code_hash = rules.checked_hash(message.code_hash, "code_hash")
    if await unit.accounts.knows_code(code_hash):
        raise Conflict("code_exists", "This sign-in code was made before.", "Make a fresh one.")
    sign_in = SignIn(id=new_id("sign_in"), expires_at=unit.now + rules.SIGN_IN_LIFE)
    signing = Signing(principal.id, principal.team_id, principal.scopes)
    await unit.accounts.add_sign_in(sign_in, signing, code_hash)
    return sign_in


async def redeem_sign_in(message: RedeemSignIn, unit: RegistryUnit, _call: Envelope) -> Token:
    """Spends the code for a session's token."""
    known_form = rules.is_hash(message.code_hash)
    signing = await unit.accounts.spend(message.code_hash, unit.now) if known_form else None
    if signing is None or await unit.accounts.role(signing.user_id, signing.team_id) is None:
        raise rules.no_valid_code()
    return await _add_token(unit, signing, "browser", rules.SESSION_LIFE, message.token_hash)


async def sign_out(message: SignOut, unit: RegistryUnit, _call: Envelope) -> Token:
    """Ends the session whose secret the gateway was shown, whatever its role and scopes: who holds it may end it."""
    known_form = rules.is_hash(message.token_hash)
    token = await unit.accounts.with_hash(message.token_hash) if known_form else None
    if token is None:
        raise rules.no_valid_token()
    return await _revoke(unit, token, message.token_hash)


async def bootstrap(store: Store[RegistryUnit], token_hash: str) -> None:
    """Makes the first user, team and token, or whatever of them is missing; repeating it changes nothing.

    The token in the file of an installation is the key of whoever owns the machine: it is kept from running out,
    and a file with a new one restores access. Only a revoked token stays revoked.
    """
    await store.run(lambda unit: _bootstrap(unit, token_hash))


async def _bootstrap(unit: RegistryUnit, token_hash: str) -> None:
    accounts, now = unit.accounts, unit.now
    user_id = await accounts.user_named(FIRST_USER)
    if user_id is None:
        user_id = new_id("user")
        await accounts.add_user(user_id, FIRST_USER, now)
    team_id = await accounts.team_named(FIRST_TEAM)
    if team_id is None:
        team_id = new_id("team")
        await accounts.add_team(team_id, FIRST_TEAM, now)
    if await accounts.role(user_id, team_id) is None:
        await accounts.add_member(user_id, team_id, "owner", now)
    await _keep_first_token(unit, Signing(user_id, team_id, ()), token_hash)


async def _keep_first_token(unit: RegistryUnit, owner: Signing, token_hash: str) -> None:
    holder = await unit.accounts.holder_of(token_hash)
    if holder is None:
        await _add_token(unit, owner, "first token", rules.FIRST_TOKEN_LIFE, token_hash)
        return
    assert holder.token.expires_at
    if holder.token.expires_at - unit.now < rules.FIRST_TOKEN_LIFE / 2:
        await unit.accounts.extend(holder.token.id, unit.now + rules.FIRST_TOKEN_LIFE)


async def _revoke(unit: RegistryUnit, token: Token, token_hash: str) -> Token:
    if not await unit.accounts.revoke(token.id, unit.now):
        return token
    gone = TokenRevoked(token_id=token.id, token_hash=token_hash)
    await unit.emit(gone, team_id=token.team_id, object_id=token.id)
    return token.model_copy(update={"revoked_at": unit.now})


async def _add_token(unit: RegistryUnit, owner: Signing, name: str, life: timedelta, token_hash: str) -> Token:
    rules.checked_hash(token_hash, "token_hash")
    if await unit.accounts.with_hash(token_hash):
        raise Conflict("token_exists", "This token was made before.", "Make a fresh one.")
    token = Token(
        id=new_id("token"),
        name=name,
        user_id=owner.user_id,
        team_id=owner.team_id,
        scopes=owner.scopes,
        created_at=unit.now,
        expires_at=unit.now + life,
    )
    await unit.accounts.add_token(token, token_hash)
    return token


def _leads(principal: Principal) -> bool:
    return principal.role in LEADERS
