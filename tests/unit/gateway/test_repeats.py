"""The same key and the same words have the same answer, whatever has become of the names in them meanwhile.

The real gateway, bus, inbox and an SQLite database; between them only the wire is missing, and the handlers are
the test's own: they answer something new each time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
from sqlalchemy.orm import registry
from sqlmodel import SQLModel

from libs.common import bus as bus_module
from libs.common.bus import Bus
from libs.common.contracts import messages as m
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Kind, Message
from libs.common.errors import NotFound
from libs.common.inbox import Inbox
from libs.common.routing import ROLES, Route, Routes, Rule
from libs.common.store import Skeleton, Store, UnitOfWork
from libs.common.waiting import end
from services.gateway.adapters.owners import BusOwners
from services.gateway.http.application import application
from services.gateway.settings import GatewaySettings
from tests.unit.gateway.fakes import (
    BEARER,
    FakeClock,
    FakeEventLog,
    FakeHints,
    authenticate_attempt,
    authenticate_token,
    parts_with,
)

pytestmark = pytest.mark.unit

# Each POST route with a body, and with one that says something else; nothing where it takes none.
TEMPLATE = {"command": ["true"]}
OTHER_TEMPLATE = {"command": ["false"]}
BODIES: dict[str, tuple[Any, Any]] = {
    "/api/v1/deployments": ({"name": "d", "model": "digits"}, {"name": "d", "model": "digits:3"}),
    "/api/v1/experiments": (
        {"project_id": "digits", "template": TEMPLATE},
        {"project_id": "digits", "template": OTHER_TEMPLATE},
    ),
    "/api/v1/filesets": (
        {"kind": "model", "project_id": "digits", "digest": "a", "files": []},
        {"kind": "model", "project_id": "digits", "digest": "b", "files": []},
    ),
    "/api/v1/filesets/{fileset_id}/seal": (None, None),
    "/api/v1/jobs": (
        {"project_id": "digits", "template": TEMPLATE},
        {"project_id": "pr1", "template": TEMPLATE},
    ),
    "/api/v1/jobs/{job_id}/clone": ({"name": "a"}, {"name": "b"}),
    "/api/v1/jobs/{job_id}/retry": (None, None),
    "/api/v1/jobs/{job_id}/metrics": ({"params": {"a": "1"}}, {"params": {"a": "2"}}),
    "/api/v1/jobs/{job_id}/stop": (None, None),
    "/api/v1/models/{model}/versions": (
        {"project_id": "digits", "fileset_id": "fs1"},
        {"project_id": "digits", "fileset_id": "fs2"},
    ),
    "/api/v1/nodes/tokens": (None, None),
    "/api/v1/nodes/{node_id}/drain": (None, None),
    "/api/v1/projects": ({"name": "digits"}, {"name": "letters"}),
    "/api/v1/projects/{project}/archive": (None, None),
    "/api/v1/projects/{project}/move": ({"team_id": "t2"}, {"team_id": "t3"}),
    "/api/v1/projects/{project}/restore": (None, None),
    "/api/v1/sign-in-links": (None, None),
    "/api/v1/tokens": ({"name": "a"}, {"name": "b"}),
}
# Its answer holds a secret, and is kept for no repeat.
NOT_REPEATED = {"/api/v1/nodes/admission"}
ANYBODY = Rule("viewer", "read", attempts=True, services=frozenset({"gateway"}))


class Base(SQLModel, registry=registry()):
    pass


SKELETON = Skeleton(Base.metadata)


@dataclass
class Owner:
    """Owns everything, and answers something new each time it has to decide."""

    models: int = 1
    names_are_gone: bool = False
    decided: list[Message] = field(default_factory=list)
    _numbers: Any = field(default_factory=count)

    async def decide(self, message: Message, _unit: UnitOfWork, _call: Envelope) -> Message:
        self.decided.append(message)
        reply: type[Message] = getattr(m, message.ROUTE.reply)
        fields = reply.model_fields
        given = {name: f"n{next(self._numbers)}" for name in ("id", "version_id", "name") if name in fields}
        if reply is m.FilesetGrant:
            given = {"fileset": m.Fileset(id=f"fs{next(self._numbers)}")}
        if reply is m.Run:
            given = {"job_id": f"js{next(self._numbers)}"}
        assert given or reply in (m.SignIn, m.NodeToken), reply
        return reply(**given)

    async def answer(self, question: Message, _view: UnitOfWork, _call: Envelope) -> Message:
        match question:
            case m.AuthenticateToken():
                return authenticate_token(question).model_copy(update={"role": ROLES[-1]})
            case m.AuthenticateAttempt():
                return authenticate_attempt(question)
            case m.GetProject() if not self.names_are_gone:
                return m.Project(id="pr1", name="digits", state="active")
            case m.GetModelVersion() if not self.names_are_gone:
                return m.ModelVersion(model_id="mo1", model_name="digits", version=self.models, project_id="pr1")
        raise NotFound("not_found", "There is no such thing any more.")

    async def prepare(self, _message: Message, _call: Envelope) -> object:
        if self.decided:
            raise NotFound("not_found", "Its files are gone since.")
        return None

    def routes(self) -> Routes:
        kinds = [kind for kind in vars(m).values() if isinstance(kind, type) and issubclass(kind, Message)]
        routed = [kind for kind in kinds if "ROUTE" in vars(kind)]
        requests = [
            Route(kind, self.decide, ANYBODY, self.prepare if kind is m.RegisterModel else None)
            for kind in routed
            if kind.ROUTE.kind is Kind.REQUEST
        ]
        queries = [Route(kind, self.answer, ANYBODY) for kind in routed if kind.ROUTE.kind is Kind.QUERY]
        return Routes("everything", (*requests, *queries))


class Wireless(Bus):
    """A bus whose requests reach the receiver at once."""

    receiver: Any

    @property
    def client(self) -> Any:
        return self

    async def request(self, subject: str, body: bytes, timeout: float, headers: dict[str, str]) -> Any:
        raw = SimpleNamespace(subject=subject, data=body, headers=headers)
        answered = await self.receiver.answerer()(SimpleNamespace(raw_message=raw))
        return SimpleNamespace(data=answered.body, headers=answered.headers)


@dataclass
class Platform:
    owner: Owner
    client: httpx.AsyncClient

    async def send(self, method: str, path: str, key: str, body: Any = None) -> httpx.Response:
        headers = BEARER | ({"Idempotency-Key": key} if key else {})
        return await self.client.request(method, path, headers=headers, json=body)


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    async with running(tmp_path) as platform:
        yield platform


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Platform]:
    store = Store(f"sqlite:///{folder}/all.db", UnitOfWork, SKELETON, "everything")
    async with store.writer.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    inbox, owner = Inbox(store, "everything"), Owner()
    bus = Wireless("gateway", "nats://127.0.0.1:1")
    bus.receiver = bus_module._Receiver(bus, owner.routes(), {"": inbox})
    settings = GatewaySettings(home=folder, front_door="http://127.0.0.1:8080", node_address="10.0.0.1")
    parts = parts_with(BusOwners(bus), settings, FakeHints(), FakeEventLog(), FakeClock())
    applying = asyncio.create_task(inbox.run())
    transport = httpx.ASGITransport(cast("Any", application(parts)))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
        yield Platform(owner, client)
    await end([applying], again_s=1.0)
    await store.close()


async def test_every_post_route_of_the_api_is_known_here(platform: Platform) -> None:
    document = (await platform.client.get("/api/v1/openapi.json")).json()
    assert {path for path, methods in document["paths"].items() if "post" in methods} - NOT_REPEATED == set(BODIES)


@pytest.mark.parametrize("path", BODIES)
async def test_a_repeat_has_the_first_answer_and_other_words_are_refused(path: str, platform: Platform) -> None:
    body, other = BODIES[path]
    place = path.replace("{", "").replace("}", "").replace("_", "")
    first = await platform.send("POST", place, "k", body)
    assert first.status_code in {200, 201}, first.text
    platform.owner.models += 1
    again = await platform.send("POST", place, "k", body)
    assert (again.status_code, again.json()) == (first.status_code, first.json())
    platform.owner.names_are_gone = True
    again = await platform.send("POST", place, "k", body)
    assert (again.status_code, again.json()) == (first.status_code, first.json())
    for anew in (place, place + "?x=1") if other else (place + "?x=1",):
        refused = await platform.send("POST", anew, "k", other)
        assert (refused.status_code, refused.json()["code"]) == (409, "idempotency_key_reused")
    assert len(platform.owner.decided) == 1


async def test_what_a_repeat_cannot_find_and_nobody_answered_is_refused_as_ever(platform: Platform) -> None:
    platform.owner.names_are_gone = True
    for key in ("k", ""):
        refused = await platform.send("POST", "/api/v1/jobs", key, {"project_id": "digits", "template": TEMPLATE})
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    assert not platform.owner.decided


async def test_a_deleted_project_answers_the_repeat_of_its_deletion_by_name(platform: Platform) -> None:
    first = await platform.send("DELETE", "/api/v1/projects/digits", "k")
    platform.owner.names_are_gone = True
    again = await platform.send("DELETE", "/api/v1/projects/digits", "k")
    assert (again.status_code, again.json()) == (200, first.json())
    assert (await platform.send("DELETE", "/api/v1/projects/digits", uuid4().hex)).status_code == 404
