"""The registry as it runs: its own process wiring, a real NATS server with the real permissions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from nats.aio.msg import Msg

from infra.local.nats import Grant, events_of, grant_for
from libs.common.bus import Bus
from libs.common.clock import utc_now
from libs.common.contracts import messages as m
from libs.common.contracts.envelope import ANSWER_OK, STATUS_HEADER, Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.subjects import EVENTS, subject_for
from libs.common.errors import Forbidden, NotFound, Unauthenticated
from libs.common.ids import new_id, new_secret, secret_hash
from libs.common.routing import Routes
from libs.common.service import Service
from services.registry.app import build
from services.registry.routes import routes
from services.registry.settings import RegistrySettings
from tests.support.nats import NatsServer, running_nats
from tests.unit.registry.harness import attempt_of, gateway, job_in, service, version_of

ROUTES = routes()

pytestmark = pytest.mark.integration

GATEWAY = Routes("gateway", (), sends=tuple(route.message for route in ROUTES.routes if route.message.ROUTE.reply))
SCHEDULER = Routes("scheduler", ())
STORAGE = Routes("storage", ())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    listening = Grant("gateway", publish=("nabla.qry.registry.>",), subscribe=("nabla.evt.>",))
    grants = [grant_for(ROUTES), grant_for(GATEWAY), grant_for(SCHEDULER), grant_for(STORAGE), listening]
    with running_nats(tmp_path / "nats", grants) as server:
        yield server


@pytest.fixture
async def settings(server: NatsServer, tmp_path: Path) -> RegistrySettings:
    await server.provision()
    token_file = tmp_path / "first-token"
    token_file.write_text(new_secret("nbl") + "\n")
    return RegistrySettings(
        home=tmp_path / "home",
        nats_url=server.url,
        nats_keys=server.folder / "keys",
        bootstrap_token_file=token_file,
    )


@asynccontextmanager
async def running(settings: RegistrySettings) -> AsyncIterator[Service]:
    registry = build(settings)
    async with registry.running():
        yield registry


@pytest.fixture
async def asker(server: NatsServer, settings: RegistrySettings) -> AsyncIterator[Bus]:
    bus = server.bus("gateway")
    await bus.start()
    yield bus
    await bus.stop()


async def signed_in(asker: Bus, settings: RegistrySettings) -> m.Principal:
    assert settings.bootstrap_token_file
    token = settings.bootstrap_token_file.read_text().strip()
    asked = m.AuthenticateToken(token_hash=secret_hash(token))
    return await asker.ask(asked, m.Principal, gateway(), timeout_s=30)


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)


async def tell(bus: Bus, event: Message, team_id: str) -> None:
    """Publishes an event as its owner's relay would."""
    envelope = Envelope(id=new_id("event"), type=event.ROUTE.type, source="scheduler", time=utc_now())
    subject = subject_for(type(event), team=team_id)
    await bus.publish_stored(EVENTS, subject, envelope.headers(), event.to_wire())


async def store_everything(storage: Bus, project: m.Project) -> None:
    """Answers for storage: every file set is there, whole, and of this project."""

    async def answer(message: Msg) -> None:
        asked = m.GetFileset.from_wire(message.data)
        assert Envelope.parse(message.headers or {}).principal == service("registry", project.team_id)
        files = m.Fileset(
            id=asked.fileset_id,
            team_id=project.team_id,
            project_id=project.id,
            kind="model",
            state="sealed",
            size_bytes=7,
            digest="d",
        )
        await storage.client.publish(message.reply, files.to_wire(), headers={STATUS_HEADER: ANSWER_OK})

    await storage.client.subscribe(subject_for(m.GetFileset), cb=answer)


async def test_first_token_opens_the_first_start_and_all_is_there_after_the_next(
    asker: Bus, settings: RegistrySettings
) -> None:
    async with running(settings):
        admin = await signed_in(asker, settings)
        assert (admin.name, admin.role) == ("admin", "owner")
        project = await asker.ask(m.CreateProject(name="digits"), m.Project, admin, key="k")
    async with running(settings):
        assert await signed_in(asker, settings) == admin
        assert await asker.ask(m.GetProject(project_id="digits"), m.Project, admin) == project
        assert await asker.ask(m.CreateProject(name="digits"), m.Project, admin, key="k") == project


async def test_run_is_made_from_events_and_filled_over_the_bus(
    server: NatsServer, asker: Bus, settings: RegistrySettings
) -> None:
    scheduler, storage = server.bus("scheduler"), server.bus("storage")
    await scheduler.start()
    await storage.start()
    told: list[str] = []

    async def hear(message: object) -> None:
        told.append(message.headers["ce-type"])  # type: ignore[attr-defined]

    await asker.client.subscribe("nabla.evt.>", cb=hear)
    async with running(settings):
        admin = await signed_in(asker, settings)
        project = await asker.ask(m.CreateProject(name="digits"), m.Project, admin, key=uuid4().hex)
        job = job_in(project, state="running")
        await tell(scheduler, m.JobRunning(job=job), job.team_id)
        attempt = attempt_of(job)
        points = tuple(m.Point(name="loss", value=1 / (step + 1), step=step) for step in range(5000))
        logged = m.LogRun(job_id=job.id, points=points)
        await asker.ask(logged, m.Run, attempt, key=uuid4().hex)
        await store_everything(storage, project)
        made = await asker.ask(version_of(project), m.ModelVersion, attempt, key=uuid4().hex)
        assert (made.size_bytes, made.digest) == (7, "d")

        async def applied() -> bool:
            return (await asker.ask(m.GetRun(job_id=job.id), m.Run, admin)).name == "train"

        await until(applied)
        page = await asker.ask(m.GetMetrics(job_id=job.id), m.MetricPage, admin)
        assert (len(page.items[0].points), page.items[0].point_count) == (1000, 5000)

        async def heard() -> bool:
            return {"project.created.v1", "run.logged.v1", "model.registered.v1"} <= set(told)

        await until(heard)
        status = await asker.ask(m.GetService(), m.ServiceStatus, gateway(), service="registry")
        assert (status.ready, status.dead_letters) == (True, 0)
    await scheduler.stop()
    await storage.stop()


async def test_runs_follow_their_project_and_go_with_it(asker: Bus, settings: RegistrySettings) -> None:
    async with running(settings) as registry:
        admin = await signed_in(asker, settings)
        project = await asker.ask(m.CreateProject(name="digits"), m.Project, admin, key="1")
        attempt = attempt_of(job_in(project))
        await asker.ask(m.LogRun(tags={"a": "b"}), m.Run, attempt, key="2")
        other = new_id("team")
        async with registry.store.begin() as unit:
            await unit.accounts.add_team(other, "other", unit.now)
            await unit.accounts.add_member(admin.id, other, "admin", unit.now)
        await asker.ask(m.MoveProject(project_id=project.id, team_id=other), m.Project, admin, key="3")
        there = admin.model_copy(update={"team_id": other})

        async def moved() -> bool:
            try:
                await asker.ask(m.GetRun(job_id=attempt.job_id), m.Run, there)
            except NotFound:
                return False
            return True

        await until(moved)


async def test_revoked_token_is_told_and_refused(asker: Bus, settings: RegistrySettings) -> None:
    told: asyncio.Queue[m.TokenRevoked] = asyncio.Queue()

    async def hear(message: object) -> None:
        told.put_nowait(m.TokenRevoked.from_wire(message.data))  # type: ignore[attr-defined]

    await asker.client.subscribe("nabla.evt.*.token.revoked.v1", cb=hear)
    async with running(settings):
        admin = await signed_in(asker, settings)
        made = m.CreateToken(name="laptop", token_hash=secret_hash("laptop"))
        token = await asker.ask(made, m.Token, admin, key="1")
        asked = m.AuthenticateToken(token_hash=secret_hash("laptop"))
        assert await asker.ask(asked, m.Principal, gateway()) == admin
        await asker.ask(m.RevokeToken(token_id=token.id), m.Token, admin, key="2")
        with pytest.raises(Unauthenticated):
            await asker.ask(asked, m.Principal, gateway())
        async with asyncio.timeout(60):
            assert (await told.get()).token_hash == secret_hash("laptop")


async def test_nobody_but_the_gateway_asks_whose_token_it_is(asker: Bus, settings: RegistrySettings) -> None:
    async with running(settings):
        admin = await signed_in(asker, settings)
        for who in (admin, service("executor", admin.team_id), attempt_of(m.Job(id=new_id("job")))):
            with pytest.raises(Forbidden):
                await asker.ask(m.AuthenticateToken(token_hash=secret_hash("x")), m.Principal, who)


async def test_writer_that_holds_the_runs_does_not_keep_anybody_from_signing_in(
    asker: Bus, settings: RegistrySettings
) -> None:
    async with running(settings) as registry:
        admin = await signed_in(asker, settings)
        async with registry.further["runs"].store.begin():
            message = m.CreateToken(name="quick", token_hash=secret_hash("quick"))
            await asker.ask(message, m.Token, admin, key="1", timeout_s=3)
            asked = m.AuthenticateToken(token_hash=secret_hash("quick"))
            await asker.ask(asked, m.Principal, gateway(), timeout_s=3)


def test_registry_publishes_only_its_own_events() -> None:
    grant = grant_for(ROUTES)
    published = {subject for subject in grant.publish if subject.startswith("nabla.evt.")}
    assert published == {subject_for(event, team="*") for event in events_of("registry")}
