"""The skeleton against a real server: a counting service that is asked, ordered, told and killed."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import nats
import nats.js.errors
import pytest
from nats.js import JetStreamContext
from sqlalchemy import func
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel, select

from infra.local.nats import PROVISIONER, Grant, grant_for
from libs.common import service as service_module
from libs.common.bus import Bus
from libs.common.clock import utc_now
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    CreateProject,
    GetProject,
    GetService,
    HaltJob,
    JobQueued,
    Principal,
    Project,
    ProjectCreated,
    ServiceStatus,
)
from libs.common.errors import Conflict, Forbidden, NotFound, Refusal, Unavailable
from libs.common.inbox import Inbox
from libs.common.migrations import migrate
from libs.common.routing import INTERNAL, Route, Routes, Rule
from libs.common.service import Service
from libs.common.settings import Settings
from libs.common.store import Skeleton, Store, UnitOfWork
from tests.support.nats import NatsServer, running_nats

pytestmark = pytest.mark.integration

ADA = Principal(kind="user", id="u1", team_id="t1", role="member")
ASKING = Principal(kind="service", id="gateway")


class Base(SQLModel, registry=registry()):
    pass


class Thing(Base, table=True):
    name: str = Field(primary_key=True)
    seen: int = 0


SKELETON = Skeleton(Base.metadata)


async def create_project(message: CreateProject, unit: UnitOfWork, call: Envelope) -> Project:
    if message.name == "taken":
        raise Conflict("project_exists", "The name is taken.", "Choose another.", project_id="pr1")
    unit.session.add(Thing(name=message.name, seen=1))
    project = Project(id=f"pr-{message.name}", team_id=call.principal.team_id, name=message.name)
    await unit.emit(ProjectCreated(project=project), team_id="t1", object_id=project.id)
    return project


async def get_project(message: GetProject, unit: UnitOfWork, _call: Envelope) -> Project:
    thing = await unit.session.get(Thing, message.project_id)
    if thing is None:
        raise NotFound("project_not_found", f"There is no project {message.project_id}.")
    return Project(id=thing.name, revision=thing.seen)


async def count(message: Any, unit: UnitOfWork, _call: Envelope) -> None:
    name = message.job.id if isinstance(message, JobQueued) else message.job_id
    if name == "poison":
        raise ValueError("cannot be handled")
    thing = await unit.session.get(Thing, name) or Thing(name=name)
    if name == "later" and not Later.allowed:
        Later.tries += 1
        raise Unavailable("not_yet", "Not yet.")
    thing.seen += 1
    unit.session.add(thing)


class Later:
    """What a test changes while a message is being put off."""

    allowed = False
    tries = 0


MEMBER = Rule(role="member", scope="write")
ROUTES = Routes(
    "registry",
    (
        Route(CreateProject, create_project, MEMBER),
        Route(GetProject, get_project, MEMBER),
        Route(JobQueued, count, INTERNAL),
        Route(HaltJob, count, INTERNAL),
    ),
)
ASKER = Routes("gateway", (), sends=(CreateProject, GetProject, JobQueued, HaltJob))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    # The command's subject names its owner, the scheduler; this suite only borrows the message.
    extra = Grant("gateway", publish=("nabla.cmd.registry.>", "nabla.qry.*.service.get.v1"))
    with running_nats(tmp_path / "nats", [grant_for(ROUTES), grant_for(ASKER), extra]) as server:
        yield server


@asynccontextmanager
async def running_service(server: NatsServer, database_url: str, home: Path) -> AsyncIterator[Service]:
    store = Store(database_url, UnitOfWork, SKELETON, "registry")
    await migrate(store.writer, "registry")
    async with store.writer.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    service = Service(
        name="registry",
        settings=Settings(home=home),
        store=store,
        bus=server.bus("registry"),
        inbox=Inbox(store, "registry"),
        routes=ROUTES,
    )
    async with service.running():
        yield service


@pytest.fixture
async def service(server: NatsServer, database_url: str, tmp_path: Path) -> AsyncIterator[Service]:
    await server.provision()
    async with running_service(server, database_url, tmp_path) as service:
        yield service


@pytest.fixture
async def asker(server: NatsServer, service: Service) -> AsyncIterator[Bus]:
    bus = server.bus("gateway")
    await bus.start()
    yield bus
    await bus.stop()


async def seen(service: Service, name: str) -> int:
    async with service.store.view() as view:
        thing = (await view.session.exec(select(Thing).where(Thing.name == name))).first()
        return thing.seen if thing else 0


async def until(condition: Any, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)


def envelope(event_id: str, message: Any) -> dict[str, str]:
    return Envelope(id=event_id, type=message.ROUTE.type, source="gateway", time=utc_now()).headers()


async def tell(bus: Bus, job_id: str, event_id: str) -> None:
    message = HaltJob(job_id=job_id)
    headers = envelope(event_id, message)
    await bus.publish_stored("CMD", "nabla.cmd.registry.0.job.halt.v1", headers, message.to_wire())


async def test_a_request_is_committed_answered_and_its_event_published(asker: Bus, service: Service) -> None:
    project = await asker.ask(CreateProject(name="digits"), Project, ADA, key="k1")
    assert project.id == "pr-digits"
    assert await seen(service, "digits") == 1

    async def relayed() -> bool:
        return await published(service) == 1

    await until(relayed)


async def published(service: Service) -> int:
    outbox = service.store.skeleton.outbox
    query = select(func.count()).select_from(outbox).where(outbox.c.published_us.is_not(None))
    async with service.store.view() as view:
        return int((await view.execute(query)).scalar_one())


async def test_the_same_key_gives_the_same_answer_once(asker: Bus, service: Service) -> None:
    first = await asker.ask(CreateProject(name="twice"), Project, ADA, key="k")
    again = await asker.ask(CreateProject(name="twice"), Project, ADA, key="k")
    assert first == again
    with pytest.raises(Conflict, match="Idempotency-Key"):
        await asker.ask(CreateProject(name="other"), Project, ADA, key="k")


async def test_a_refusal_arrives_as_the_error_it_was(asker: Bus) -> None:
    with pytest.raises(Conflict) as caught:
        await asker.ask(CreateProject(name="taken"), Project, ADA)
    assert (caught.value.code, caught.value.remedy) == ("project_exists", "Choose another.")
    assert caught.value.facts == {"project_id": "pr1"}


async def test_a_query_reads_what_was_committed(asker: Bus) -> None:
    await asker.ask(CreateProject(name="here"), Project, ADA)
    assert (await asker.ask(GetProject(project_id="here"), Project, ADA)).revision == 1
    with pytest.raises(NotFound):
        await asker.ask(GetProject(project_id="gone"), Project, ADA)


@pytest.mark.parametrize(
    "principal",
    [
        ADA.model_copy(update={"role": "viewer"}),
        ADA.model_copy(update={"role": ""}),
        ADA.model_copy(update={"scopes": ("read",)}),
        Principal(kind="attempt", id="at1", team_id="t1"),
        Principal(kind="service", id="serving", team_id="t1"),
    ],
)
async def test_who_has_not_the_right_is_refused_and_nothing_changes(
    asker: Bus, service: Service, principal: Principal
) -> None:
    with pytest.raises(Forbidden):
        await asker.ask(CreateProject(name="forbidden"), Project, principal)
    assert await seen(service, "forbidden") == 0


async def test_a_command_delivered_twice_has_one_effect(asker: Bus, service: Service) -> None:
    await tell(asker, "js1", "ev1")
    await until(lambda: _is(service, "js1", 1))
    async with service.store.view() as view:
        assert await view.already_applied("ev1")
    route = ROUTES.routes[3]
    call = Envelope.parse(envelope("ev1", HaltJob))
    answer = await service.inbox.apply(route, HaltJob(job_id="js1"), call)
    assert answer.status == "duplicate"
    assert await seen(service, "js1") == 1


async def _is(service: Service, name: str, value: int) -> bool:
    return await seen(service, name) == value


async def test_many_commands_are_applied_once_each(asker: Bus, service: Service) -> None:
    await asyncio.gather(*(tell(asker, f"many{n % 10}", f"many-{n}") for n in range(500)))
    for n in range(10):
        await until(lambda n=n: _is(service, f"many{n}", 50))


async def test_poison_goes_to_the_dead_letters_and_the_rest_flows(asker: Bus, service: Service) -> None:
    await tell(asker, "poison", "bad1")
    await tell(asker, "fine", "good1")
    await until(lambda: _is(service, "fine", 1))

    async def dead() -> bool:
        return await service._count_dead_letters() == 1

    await until(dead)


async def test_a_transient_failure_is_repeated_until_it_passes(asker: Bus, service: Service) -> None:
    Later.allowed, Later.tries = False, 0
    await tell(asker, "later", "later1")

    async def tried() -> bool:
        return Later.tries >= 2

    await until(tried)
    Later.allowed = True
    await until(lambda: _is(service, "later", 1))


async def test_a_restart_of_the_bus_loses_nothing(asker: Bus, service: Service, server: NatsServer) -> None:
    await tell(asker, "before", "b1")
    server.kill()
    with pytest.raises(Refusal):
        await asker.ask(GetProject(project_id="x"), Project, ADA, timeout_s=0.5)
    server.start()

    async def back() -> bool:
        try:
            await tell(asker, "after", "a1")
        except Exception:
            return False
        return True

    await until(back, 30)
    await until(lambda: _is(service, "before", 1), 60)
    await until(lambda: _is(service, "after", 1), 60)


@pytest.mark.usefixtures("service")
async def test_what_the_bus_forgot_in_an_unclean_stop_is_published_again(asker: Bus, server: NatsServer) -> None:
    async def stored() -> int:
        connection = await nats.connect(server.url, nkeys_seed_str=server.seed(PROVISIONER))
        try:
            return (await connection.jetstream(timeout=5).stream_info("EVT")).state.messages
        except nats.js.errors.Error:
            return 0
        finally:
            await connection.close()

    async def has_it() -> bool:
        return await stored() == 1

    await asker.ask(CreateProject(name="digits"), Project, ADA, key="k1")
    await until(has_it)
    server.kill()
    shutil.rmtree(server.folder / "store")
    server.start()
    assert await stored() == 0
    await server.provision()
    await until(has_it)


@pytest.fixture
async def provisioner(server: NatsServer) -> AsyncIterator[JetStreamContext]:
    connection = await nats.connect(server.url, nkeys_seed_str=server.seed(PROVISIONER))
    yield connection.jetstream(timeout=5)
    await connection.close()


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "CONSUMER_CHECK_S", 0.1)


@pytest.mark.usefixtures("_often")
async def test_a_consumer_that_was_deleted_is_made_again(
    asker: Bus, service: Service, provisioner: JetStreamContext
) -> None:
    await tell(asker, "before", "b1")
    await until(lambda: _is(service, "before", 1))
    await provisioner.delete_consumer("CMD", "registry")
    await tell(asker, "after", "a1")
    await until(lambda: _is(service, "after", 1))


@pytest.mark.usefixtures("_often")
async def test_without_its_streams_a_service_is_not_ready_and_says_why(
    asker: Bus, service: Service, provisioner: JetStreamContext, server: NatsServer, tmp_path: Path
) -> None:
    async def ready() -> bool:
        return await asyncio.to_thread(_ready, tmp_path)

    async def not_ready() -> bool:
        return not await ready()

    await until(ready)
    await provisioner.delete_stream("CMD")
    await until(not_ready)
    told = await asker.ask(GetService(), ServiceStatus, ASKING, service="registry")
    assert not told.ready
    assert "stream not found" in told.detail
    await server.provision()
    await until(ready)
    await tell(asker, "after", "a1")
    await until(lambda: _is(service, "after", 1))


def _ready(home: Path) -> bool:
    address = json.loads((home / "run" / "registry.json").read_text())["metrics"].replace("/metrics", "/readyz")
    return httpx.get(address, timeout=10).status_code == 200


async def test_a_service_may_not_publish_what_is_not_its_own(server: NatsServer) -> None:
    """The client is told nothing but a time-out; the server's log says what it has refused."""
    subject = "nabla.evt.t1.project.created.v1"
    bus = server.bus("gateway")
    await bus.start()
    try:
        await bus.hint(subject, b"{}")
        await bus.client.flush()
    finally:
        await bus.stop()
    told = (server.folder / "nats.log").read_text()
    assert re.search(rf'Publish Violation .* Subject "{re.escape(subject)}"', told), told[-1000:]
