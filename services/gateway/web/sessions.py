"""Browsers sign in by a one-time link and sign out again."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated
from uuid import uuid4

from fastapi import APIRouter, Query, Request
from starlette.responses import RedirectResponse, Response

from libs.common.clock import utc_now
from libs.common.contracts.messages import RedeemSignIn, SignOut, Token
from libs.common.errors import Conflict, NotFound, Unauthenticated
from libs.common.ids import new_secret, secret_hash
from services.gateway.authentication import GATEWAY, refused
from services.gateway.http.parts import Wired, cookie_of
from services.gateway.ports import Once
from services.gateway.web.pages import to_interface
from services.gateway.web.rendering import render

router = APIRouter(include_in_schema=False)

LONGEST_S = 30 * 86_400


@router.get("/sign-in")
async def sign_in(
    request: Request, parts: Wired, code: Annotated[str, Query(max_length=200, pattern=r"^[!-~]*$")] = ""
) -> Response:
    """Without a code, says how to get one; with one, spends it and sets the session's cookie."""
    to_interface(request, parts)
    if not code:
        return render("sign_in.html", title="Sign in", spent=False)
    secret = new_secret("nbl")
    message = RedeemSignIn(code_hash=secret_hash(code), token_hash=secret_hash(secret))
    try:
        # A fresh key: under the code's own a second use would be taken for a repeat, and answered.
        token = await parts.owners.ask(message, Token, GATEWAY, once=Once(str(uuid4())))
    except (Conflict, NotFound, Unauthenticated):
        return render("sign_in.html", status=401, title="Sign in", spent=True)
    response = RedirectResponse("/", 303)
    response.set_cookie(
        cookie_of(request),
        secret,
        max_age=session_s(token, utc_now()),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/sign-out")
async def sign_out(request: Request, parts: Wired) -> Response:
    """Ends the session and drops its cookie, which stays when it could not be ended; asked by our own page only."""
    headers = request.headers
    if not parts.settings.origins.cookie_counts(headers.get("host", ""), headers.get("sec-fetch-site", "")):
        raise refused("Only Nabla's own pages may sign a browser out.")
    if session := request.cookies.get(cookie_of(request), ""):
        # A copy of the cookie, from a backup or a shared machine, must not outlive it.
        with suppress(Unauthenticated):
            await parts.owners.ask(SignOut(token_hash=secret_hash(session)), Token, GATEWAY, once=Once(str(uuid4())))
        parts.authenticator.forget(session)
    response = RedirectResponse("/sign-in", 303)
    response.delete_cookie(cookie_of(request))
    return response


def session_s(token: Token, now: datetime) -> int:
    """How long the browser keeps the session: as long as its token counts."""
    if token.expires_at is None:
        return LONGEST_S
    return max(0, min(LONGEST_S, int((token.expires_at.astimezone(UTC) - now).total_seconds())))
