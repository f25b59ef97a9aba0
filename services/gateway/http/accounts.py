"""Who one is, API tokens, and one-time sign-in links for browsers."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from libs.common.contracts.messages import (
    CreateSignIn,
    CreateToken,
    ListTokens,
    Principal,
    RevokeToken,
    SignIn,
    Token,
    TokenPage,
)
from libs.common.ids import secret_hash
from services.gateway.http.bodies import Body
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import API, Caller, Cursor, Id, Knows, Limit, Wired

router = APIRouter(prefix=API, tags=["accounts"], responses=RESPONSES)


class NewToken(Body):
    name: Annotated[str, Field(max_length=200, examples=["laptop"])] = ""
    scopes: Annotated[tuple[str, ...], Field(max_length=10, examples=[["read", "write"]])] = ()
    lifetime_s: Annotated[float, Field(ge=0, description="0 for the platform's default.")] = 0.0


class SignInLink(BaseModel):
    url: str = Field(description="Open it in a browser, once.")
    expires_at: datetime | None = None


@router.get("/whoami", summary="Who the token is")
async def whoami(caller: Caller) -> Principal:
    return caller


@router.post("/tokens", status_code=201, summary="Make an API token; the answer alone shows its secret")
async def create_token(body: NewToken, caller: Caller, once: Knows, parts: Wired) -> Token:
    # Made from the key, so that a repeat of this request answers the same secret.
    secret = parts.secrets.make("nbl", "token", caller.id, once.key)
    message = CreateToken(
        name=body.name, scopes=body.scopes, lifetime_s=body.lifetime_s, token_hash=secret_hash(secret)
    )
    created = await parts.owners.ask(message, Token, caller, once=once)
    return created.model_copy(update={"secret": secret})


@router.get("/tokens", summary="List one's API tokens")
async def list_tokens(caller: Caller, parts: Wired, cursor: Cursor = "", limit: Limit = 50) -> TokenPage:
    return await parts.owners.ask(ListTokens(cursor=cursor, limit=limit), TokenPage, caller)


@router.delete("/tokens/{token_id}", summary="Revoke a token, at once")
async def revoke_token(token_id: Id, caller: Caller, once: Knows, parts: Wired) -> Token:
    return await parts.owners.ask(RevokeToken(token_id=token_id), Token, caller, once=once)


@router.post("/sign-in-links", status_code=201, summary="Make a link that signs a browser in once")
async def create_sign_in_link(request: Request, caller: Caller, once: Knows, parts: Wired) -> SignInLink:
    code = parts.secrets.make("nbls", "sign-in", caller.id, once.key)
    message = CreateSignIn(code_hash=secret_hash(code))
    created = await parts.owners.ask(message, SignIn, caller, once=once)
    host = parts.settings.origins.interface_address(request.headers.get("host", ""))
    return SignInLink(url=f"{request.url.scheme}://{host}/sign-in?code={code}", expires_at=created.expires_at)
