"""The outside of the gateway, in a few lines each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from fastapi import FastAPI

from libs.common.contracts.message import Message
from libs.common.contracts.messages import AuthenticateAttempt, AuthenticateToken, Execution, Principal
from libs.common.errors import NotFound, Unauthenticated, Unavailable
from libs.common.ids import secret_hash
from services.gateway.adapters.hints import QueuedListener
from services.gateway.adapters.secrets import SecretMaker
from services.gateway.authentication import Authenticator
from services.gateway.domain.tokens import Limits, TokenCache
from services.gateway.following import JobFollower
from services.gateway.http.application import application
from services.gateway.http.parts import Parts
from services.gateway.ports import Hint, Once, Owners, StoredEvent
from services.gateway.settings import GatewaySettings

M = TypeVar("M", bound=Message)
Answer = Callable[[Any], Any]

TEAM = "t1"
MEMBER = Principal(kind="user", id="u1", name="Ada", team_id=TEAM, role="member")
MEMBER_TOKEN = "nbl_member"
ATTEMPT = Execution(attempt_id="at1", job_id="js1", number=2, team_id=TEAM, project_id="pr1", state="running")
ATTEMPT_TOKEN = "nbla_attempt"
BEARER = {"Authorization": f"Bearer {MEMBER_TOKEN}"}


@dataclass
class Asked:
    message: Message
    principal: Principal
    key: str
    service: str


@dataclass
class FakeOwners:
    """Answers by the type of the message; what it has no answer for is silent."""

    answers: dict[type[Message], Answer] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    async def ask(
        self,
        message: Message,
        reply: type[M],
        principal: Principal,
        *,
        once: Once | None = None,
        service: str = "",
        timeout_s: float = 5.0,
    ) -> M:
        self.asked.append(Asked(message, principal, once.key if once else "", service))
        answer = self.answers.get(type(message))
        if answer is None:
            raise Unavailable("service_silent", "nobody answers")
        found = answer(message)
        assert isinstance(found, reply)
        return found

    async def earlier(self, message: Message, reply: type[M], principal: Principal, once: Once) -> M:
        raise NotFound("not_answered", "Nothing was answered under this key.")

    def of(self, kind: type[M]) -> list[M]:
        return [each.message for each in self.asked if isinstance(each.message, kind)]


class FakeHints:
    """Hints given by the test reach whoever listens to their subject."""

    def __init__(self) -> None:
        self.listeners: dict[QueuedListener, tuple[str, ...]] = {}

    @asynccontextmanager
    async def listen(self, *subjects: str) -> AsyncIterator[QueuedListener]:
        listener = QueuedListener()
        self.listeners[listener] = subjects
        try:
            yield listener
        finally:
            del self.listeners[listener]

    def give(self, hint: Hint) -> None:
        for listener, subjects in self.listeners.items():
            if any(hint.subject == each or hint.subject.startswith(each.removesuffix(">")) for each in subjects):
                listener.put(hint)


@dataclass
class FakeEventLog:
    events: list[StoredEvent] = field(default_factory=list)
    asked_after: list[int] = field(default_factory=list)

    async def newest(self) -> int:
        return self.events[-1].sequence if self.events else 0

    async def read(self, team_id: str, after: int) -> AsyncGenerator[StoredEvent | None, None]:
        self.asked_after.append(after)
        for event in self.events:
            if event.sequence > after:
                yield event
        while True:
            await asyncio.sleep(0.01)
            yield None


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class World:
    """A gateway without a network beneath it."""

    owners: FakeOwners
    hints: FakeHints
    event_log: FakeEventLog
    clock: FakeClock
    parts: Parts
    app: Any


def authenticate_token(question: AuthenticateToken) -> Principal:
    if question.token_hash != secret_hash(MEMBER_TOKEN):
        raise Unauthenticated("token_invalid", "No such token.", "Sign in.")
    return MEMBER


def authenticate_attempt(question: AuthenticateAttempt) -> Execution:
    if question.token_hash != secret_hash(ATTEMPT_TOKEN):
        raise Unauthenticated("token_invalid", "No such attempt.", "")
    return ATTEMPT


def new_world(home: Path, **settings: Any) -> World:
    owners, hints, event_log, clock = FakeOwners(), FakeHints(), FakeEventLog(), FakeClock()
    owners.answers |= {AuthenticateToken: authenticate_token, AuthenticateAttempt: authenticate_attempt}
    chosen = GatewaySettings(home=home, front_door="http://127.0.0.1:8080", follow_poll_s=0.05, **settings)
    parts = parts_with(owners, chosen, hints, event_log, clock)
    return World(owners, hints, event_log, clock, parts, application_of(parts))


def application_of(parts: Parts) -> FastAPI:
    """The application over these parts, one at a time.

    FastAPI works out all routes anew for each application, a tenth of a second with which every test would begin;
    what tests change are the parts behind it.
    """
    app = shared_application(parts.settings.model_copy(update={"home": Path("/nowhere")}))
    app.state.parts = parts
    return app


@cache
def shared_application(settings: GatewaySettings) -> FastAPI:
    return application(cast("Parts", SimpleNamespace(settings=settings)))


def parts_with(
    owners: Owners, settings: GatewaySettings, hints: FakeHints, event_log: FakeEventLog, clock: FakeClock
) -> Parts:
    return Parts(
        settings=settings,
        owners=owners,
        authenticator=Authenticator(owners, TokenCache(Limits()), clock),
        follower=JobFollower(owners, hints, settings.follow_poll_s),
        event_log=event_log,
        secrets=SecretMaker(b"k" * 32),
    )
