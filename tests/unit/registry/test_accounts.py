from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from libs.common.contracts import messages as m
from libs.common.errors import Conflict, Forbidden, Invalid, NotFound, Refusal, Unauthenticated
from libs.common.ids import new_id, new_secret, secret_hash
from services.registry.domain import accounts as rules
from services.registry.handlers.accounts import bootstrap
from tests.unit.registry.harness import Catalogue, gateway

pytestmark = pytest.mark.unit


async def token_of(catalogue: Catalogue, holder: m.Principal, **asked: object) -> tuple[m.Token, str]:
    token_hash = secret_hash(new_secret("nbl"))
    message = m.CreateToken.model_validate({"name": "laptop", "token_hash": token_hash} | asked)
    return await catalogue.ask(message, holder, m.Token), token_hash


async def whose(catalogue: Catalogue, token_hash: str) -> m.Principal:
    return await catalogue.ask(m.AuthenticateToken(token_hash=token_hash), gateway(), m.Principal)


async def refusal_of(catalogue: Catalogue, token_hash: str) -> str:
    with pytest.raises(Unauthenticated) as refusal:
        await whose(catalogue, token_hash)
    return f"{refusal.value.code} {refusal.value.detail} {refusal.value.remedy}"


async def test_token_tells_who_holds_it_with_role_and_scopes(catalogue: Catalogue, member: m.Principal) -> None:
    _, token_hash = await token_of(catalogue, member, scopes=("write", "read"))
    expected = member.model_copy(update={"scopes": ("read", "write")})
    assert await whose(catalogue, token_hash) == expected


async def test_token_lives_ninety_days_unless_asked_otherwise(catalogue: Catalogue, member: m.Principal) -> None:
    token, token_hash = await token_of(catalogue, member)
    assert token.expires_at == catalogue.time() + timedelta(days=90)
    assert (token.secret, token.revoked_at) == ("", None)
    catalogue.time.pass_(days=90, microseconds=-1)
    await whose(catalogue, token_hash)
    catalogue.time.pass_(microseconds=1)
    await refusal_of(catalogue, token_hash)


async def test_expired_revoked_unknown_and_malformed_tokens_get_the_same_answer(
    catalogue: Catalogue, member: m.Principal
) -> None:
    _, expired = await token_of(catalogue, member, lifetime_s=1)
    revoked_token, revoked = await token_of(catalogue, member)
    await catalogue.ask(m.RevokeToken(token_id=revoked_token.id), member, m.Token)
    catalogue.time.pass_(seconds=2)
    asked = (expired, revoked, secret_hash("unknown"), "", "' OR 1=1 --", "\0" * 64)
    assert len({await refusal_of(catalogue, token_hash) for token_hash in asked}) == 1


async def test_token_of_somebody_who_left_the_team_is_refused(catalogue: Catalogue, member: m.Principal) -> None:
    _, token_hash = await token_of(catalogue, member)
    from services.registry.store.accounts import MEMBERSHIPS

    async with catalogue.store.begin() as unit:
        await unit.execute(MEMBERSHIPS.delete().where(MEMBERSHIPS.c.user_id == member.id))
    await refusal_of(catalogue, token_hash)


async def test_role_of_a_token_is_the_role_its_user_has_now(catalogue: Catalogue, member: m.Principal) -> None:
    _, token_hash = await token_of(catalogue, member)
    from services.registry.store.accounts import MEMBERSHIPS

    async with catalogue.store.begin() as unit:
        mine = MEMBERSHIPS.c.user_id == member.id
        await unit.execute(MEMBERSHIPS.update().where(mine).values(role="viewer"))
    assert (await whose(catalogue, token_hash)).role == "viewer"


async def test_revoking_tells_everyone_once_and_repeating_it_changes_nothing(
    catalogue: Catalogue, member: m.Principal
) -> None:
    token, token_hash = await token_of(catalogue, member)
    first = await catalogue.ask(m.RevokeToken(token_id=token.id), member, m.Token)
    catalogue.time.pass_(seconds=9)
    again = await catalogue.ask(m.RevokeToken(token_id=token.id), member, m.Token)
    assert first.revoked_at == again.revoked_at is not None
    events = [(kind, body) for kind, body, _ in await catalogue.emitted()]
    assert events == [("token.revoked.v1", {"token_id": token.id, "token_hash": token_hash})]


async def test_members_see_and_revoke_their_own_tokens_and_admins_all_of_the_team(
    catalogue: Catalogue, owner: m.Principal, member: m.Principal
) -> None:
    mine, _ = await token_of(catalogue, member)
    theirs, _ = await token_of(catalogue, owner)
    own = await catalogue.ask(m.ListTokens(), member, m.TokenPage)
    everyones = await catalogue.ask(m.ListTokens(), owner, m.TokenPage)
    assert [token.id for token in own.items] == [mine.id]
    assert [token.id for token in everyones.items] == [theirs.id, mine.id]
    with pytest.raises(NotFound):
        await catalogue.ask(m.RevokeToken(token_id=theirs.id), member, m.Token)
    await catalogue.ask(m.RevokeToken(token_id=mine.id), owner, m.Token)


async def test_tokens_are_listed_in_pages(catalogue: Catalogue, owner: m.Principal) -> None:
    made = [(await token_of(catalogue, owner))[0].id for _ in range(5)]
    seen, cursor = [], ""
    while True:
        page = await catalogue.ask(m.ListTokens(limit=2, cursor=cursor), owner, m.TokenPage)
        seen += [token.id for token in page.items]
        cursor = page.next_cursor
        if not cursor:
            break
    assert seen == made[::-1]


@pytest.mark.parametrize(
    ("own", "asked", "granted"),
    [
        ((), (), ()),
        ((), ("admin", "read"), ("read", "admin")),
        (("read", "admin"), (), ("read", "admin")),
        (("read", "admin"), ("read",), ("read",)),
        (("read", "admin"), ("write",), None),
        (("admin",), ("read", "admin"), None),
    ],
)
def test_new_token_never_allows_more_than_the_one_that_asks(
    own: tuple[str, ...], asked: tuple[str, ...], granted: tuple[str, ...] | None
) -> None:
    if granted is None:
        with pytest.raises(Forbidden):
            rules.granted_scopes(asked, own)
    else:
        assert rules.granted_scopes(asked, own) == granted


@pytest.mark.parametrize(
    "asked",
    [
        {"scopes": ("everything",)},
        {"lifetime_s": -1},
        {"lifetime_s": 0.5},
        {"lifetime_s": 367 * 86_400},
        {"lifetime_s": float("nan")},
        {"name": "x" * 101},
        {"name": "two\nlines"},
        {"token_hash": "nbl_a-secret-by-mistake"},
        {"token_hash": "A" * 64},
    ],
)
async def test_token_that_cannot_be_is_refused(
    catalogue: Catalogue, member: m.Principal, asked: dict[str, object]
) -> None:
    message = m.CreateToken.model_validate({"name": "x", "token_hash": secret_hash("x")} | asked)
    with pytest.raises(Invalid):
        await catalogue.send(message, member, "")


async def test_token_hash_is_never_used_twice(catalogue: Catalogue, member: m.Principal) -> None:
    _, token_hash = await token_of(catalogue, member)
    with pytest.raises(Conflict):
        await token_of(catalogue, member, token_hash=token_hash)


async def test_sign_in_code_becomes_a_session_of_thirty_days_within_the_limits_of_its_token(
    catalogue: Catalogue, member: m.Principal
) -> None:
    limited = member.model_copy(update={"scopes": ("read", "write")})
    sign_in = await catalogue.ask(m.CreateSignIn(code_hash=secret_hash("code")), limited, m.SignIn)
    assert sign_in.expires_at == catalogue.time() + timedelta(minutes=10)
    catalogue.time.pass_(minutes=9)
    redeem = m.RedeemSignIn(code_hash=secret_hash("code"), token_hash=secret_hash("session"))
    token = await catalogue.ask(redeem, gateway(), m.Token)
    assert token.expires_at == catalogue.time() + timedelta(days=30)
    assert await whose(catalogue, secret_hash("session")) == limited


async def test_spent_expired_unknown_and_malformed_codes_get_the_same_answer(
    catalogue: Catalogue, member: m.Principal
) -> None:
    async def refusal(code_hash: str) -> str:
        redeem = m.RedeemSignIn(code_hash=code_hash, token_hash=secret_hash(new_id("token")))
        with pytest.raises(Unauthenticated) as refusal:
            await catalogue.send(redeem, gateway(), new_id("event"))
        return refusal.value.code + refusal.value.detail

    for code in ("spent", "late"):
        await catalogue.ask(m.CreateSignIn(code_hash=secret_hash(code)), member, m.SignIn)
    spend = m.RedeemSignIn(code_hash=secret_hash("spent"), token_hash=secret_hash("session"))
    await catalogue.ask(spend, gateway(), m.Token)
    catalogue.time.pass_(minutes=10)
    codes = (secret_hash("spent"), secret_hash("late"), secret_hash("never"), "code", "")
    assert len({await refusal(code) for code in codes}) == 1


@pytest.mark.parametrize("scopes", [(), ("read",)])
async def test_signing_out_ends_the_session_for_good_and_tells_it(
    catalogue: Catalogue, member: m.Principal, scopes: tuple[str, ...]
) -> None:
    _, session = await token_of(catalogue, member, scopes=scopes)
    _, other = await token_of(catalogue, member)
    ended = await catalogue.ask(m.SignOut(token_hash=session), gateway(), m.Token)
    assert ended.revoked_at == catalogue.time()
    assert (await catalogue.ask(m.SignOut(token_hash=session), gateway(), m.Token)).id == ended.id
    await refusal_of(catalogue, session)
    await whose(catalogue, other)
    told = [body for kind, body, _ in await catalogue.emitted() if kind == "token.revoked.v1"]
    assert told == [{"token_id": ended.id, "token_hash": session}]
    for unknown in (secret_hash("unknown"), "", "\0"):
        with pytest.raises(Unauthenticated):
            await catalogue.ask(m.SignOut(token_hash=unknown), gateway(), m.Token)


async def test_sign_in_code_is_spent_once_however_many_try_at_once(catalogue: Catalogue, member: m.Principal) -> None:
    await catalogue.ask(m.CreateSignIn(code_hash=secret_hash("code")), member, m.SignIn)
    attempts = [
        catalogue.send(
            m.RedeemSignIn(code_hash=secret_hash("code"), token_hash=secret_hash(f"session {n}")), gateway(), ""
        )
        for n in range(20)
    ]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 1
    assert all(isinstance(outcome, Unauthenticated) for outcome in outcomes if isinstance(outcome, BaseException))
    tokens = await catalogue.ask(m.ListTokens(), member, m.TokenPage)
    assert [token.name for token in tokens.items] == ["browser"]


async def test_first_account_is_made_once_and_its_token_opens_it(catalogue: Catalogue) -> None:
    token_hash = secret_hash("nbl_first")
    for _ in range(3):
        await bootstrap(catalogue.store, token_hash)
    holder = await whose(catalogue, token_hash)
    assert (holder.name, holder.role, holder.scopes, holder.operator) == ("admin", "owner", (), True)
    assert len((await catalogue.ask(m.ListTokens(), holder, m.TokenPage)).items) == 1


async def test_first_token_does_not_run_out_while_the_installation_is_used(catalogue: Catalogue) -> None:
    token_hash = secret_hash("nbl_first")
    for _ in range(10):
        await bootstrap(catalogue.store, token_hash)
        catalogue.time.pass_(days=180)
        await whose(catalogue, token_hash)


async def test_new_token_file_restores_access_and_a_revoked_first_token_stays_revoked(
    catalogue: Catalogue,
) -> None:
    await bootstrap(catalogue.store, secret_hash("nbl_first"))
    holder = await whose(catalogue, secret_hash("nbl_first"))
    token = (await catalogue.ask(m.ListTokens(), holder, m.TokenPage)).items[0]
    await catalogue.ask(m.RevokeToken(token_id=token.id), holder, m.Token)
    await bootstrap(catalogue.store, secret_hash("nbl_first"))
    await refusal_of(catalogue, secret_hash("nbl_first"))
    await bootstrap(catalogue.store, secret_hash("nbl_second"))
    assert (await whose(catalogue, secret_hash("nbl_second"))).id == holder.id


def test_bootstrap_file_with_something_else_is_refused_without_repeating_it() -> None:
    token = new_secret("nbl")
    assert rules.first_token(f"{token}\n") == token
    with pytest.raises(ValueError, match="bootstrap token file") as error:
        rules.first_token("hunter2")
    assert "hunter2" not in str(error.value)


async def test_refusals_say_what_to_do(catalogue: Catalogue, member: m.Principal) -> None:
    with pytest.raises(Refusal) as refusal:
        await token_of(catalogue, member, scopes=("root",))
    assert refusal.value.remedy
