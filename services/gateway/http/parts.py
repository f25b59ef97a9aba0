"""What every route needs: the wired parts, who asks, and by what a repeat of the request is known."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from hashlib import sha256
from typing import Annotated, Any, ParamSpec, cast
from uuid import uuid4

from fastapi import Depends, Header, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from libs.common.contracts.message import Message
from libs.common.contracts.messages import Principal
from libs.common.errors import NotFound, Refusal, Unavailable
from services.gateway.adapters.secrets import SecretMaker
from services.gateway.authentication import Authenticator, refused
from services.gateway.domain.origins import port_suffix
from services.gateway.following import JobFollower
from services.gateway.ports import EventLog, M, Once, Owners
from services.gateway.settings import GatewaySettings

P = ParamSpec("P")
Route = Callable[P, Awaitable[M]]
# Where the REST API begins.
API = "/api/v1"
SESSION = "nabla_session"
HEADER_TEXT = r"^[!-~]{1,255}$"
# Control characters are never part of a name; PostgreSQL refuses NUL, and logs would carry the rest.
NAME = r"^[^\x00-\x1f\x7f]+$"


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything the routes work with."""

    settings: GatewaySettings
    owners: Owners
    authenticator: Authenticator
    follower: JobFollower
    event_log: EventLog
    secrets: SecretMaker


def parts_of(request: Request) -> Parts:
    return cast("Parts", request.app.state.parts)


Wired = Annotated[Parts, Depends(parts_of)]


def cookie_of(request: Request) -> str:
    """The name of the session's cookie: browsers keep one jar a host, whatever the port, and two installations on one
    machine must not sign each other's people out.
    """
    return SESSION + port_suffix(request.headers.get("host", "")).replace(":", "_")


_bearer = HTTPBearer(auto_error=False, description="A token from `nabla login`, or a job's own NABLA_TOKEN.")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def token_of(request: Request, bearer: Bearer, parts: Wired) -> str:
    """The token that speaks for this request: the bearer's, or the session's for the interface's own scripts.

    Raises:
        Unauthenticated: there is none, or the cookie came from elsewhere.
    """
    if bearer:
        return bearer.credentials
    session = request.cookies.get(cookie_of(request), "")
    if not session:
        raise refused("This needs a token: `Authorization: Bearer <token>`.")
    headers = request.headers
    if not parts.settings.origins.cookie_counts(headers.get("host", ""), headers.get("sec-fetch-site", "")):
        raise refused("A browser session counts only for requests of Nabla's own pages.")
    return session


Token = Annotated[str, Depends(token_of)]


async def principal_of(token: Token, parts: Wired) -> Principal:
    """Who asks; every route but the public ones depends on this."""
    return await parts.authenticator.principal_of(token)


Caller = Annotated[Principal, Depends(principal_of)]


async def once_of(
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(pattern=HEADER_TEXT, description="Repeat a request with the same key and it takes effect once."),
    ] = None,
) -> Once:
    if not idempotency_key:
        return Once(str(uuid4()))
    # As it was sent: what the routes make of it, such as the newest version of a model, may differ the next time.
    line = f"{request.method} {request.url.path}?{request.url.query}\n"
    return Once(idempotency_key, sha256(line.encode() + await request.body()).hexdigest())


Knows = Annotated[Once, Depends(once_of)]


def answers_again(kind: type[Message], reply: type[M]) -> Callable[[Route[P, M]], Route[P, M]]:
    """For a route that resolves names before it asks their owner.

    A repeat may find them gone or changed, often by the very request that it repeats: a deleted project has given up
    its name. So when it is refused, the owner is asked whether it has answered these words before.
    """

    def wrapped(route: Route[P, M]) -> Route[P, M]:
        @wraps(route)
        async def answer(*args: P.args, **kwargs: P.kwargs) -> M:
            try:
                return await route(*args, **kwargs)
            except Unavailable:
                raise
            except Refusal as refusal:
                parts, caller, once = (cast("Any", kwargs[name]) for name in ("parts", "caller", "once"))
                if not once.request_hash:
                    raise
                try:
                    return cast("M", await parts.owners.earlier(kind(), reply, caller, once))
                except NotFound:
                    raise refusal from None

        return answer

    return wrapped


Ref = Annotated[str, Path(max_length=200, pattern=NAME, description="Id or name.")]
Id = Annotated[str, Path(max_length=64, pattern=r"^[a-z0-9]+$")]
Cursor = Annotated[str, Query(max_length=500, pattern=r"^[A-Za-z0-9_=-]*$", description="`next_cursor` of a page.")]
Limit = Annotated[int, Query(ge=1, le=500)]
Word = Annotated[str, Query(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]


def content_endpoint(request: Request, parts: Parts) -> str:
    """`host:port` for which links to files are signed: the front door as the client reached it."""
    return parts.settings.origins.content_address(request.headers.get("host", ""))
