"""The service as it runs: real NATS with its own permissions, real Traefik, a scheduler and a storage of few lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.local.nats import grant_for
from libs.common.bus import Bus
from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    Attempt,
    CreateDeployment,
    DeleteDeployment,
    Deployment,
    File,
    FilePage,
    Fileset,
    GetDeployment,
    GetJob,
    GetLog,
    HaltJob,
    Job,
    JobCancelled,
    JobDetail,
    JobFailed,
    JobRunning,
    JobSucceeded,
    ListFiles,
    LogLine,
    LogPage,
    OrderJob,
)
from libs.common.contracts.subjects import EVENTS, subject_for
from libs.common.errors import NotFound
from libs.common.inbox import Inbox
from libs.common.migrations import migrate
from libs.common.relay import Relay
from libs.common.routing import INTERNAL, Route, Routes, Rule
from libs.common.store import Store
from libs.common.waiting import end
from services.serving.app import build
from services.serving.routes import routes
from services.serving.settings import ServingSettings
from services.serving.store import SKELETON, ServingUnit
from tests.integration.serving.test_traefik import echo
from tests.support.nats import NatsServer, running_nats
from tests.support.serving import CREATE, MEMBER
from tests.support.traefik import Traefik, running_traefik

pytestmark = pytest.mark.integration
ASKED = Rule(role=None, scope="internal", services=frozenset({"serving"}))


class FakeScheduler:
    """Starts replicas where it is told, ends builds as it is told, and answers for storage too."""

    def __init__(self, bus: Bus, replica: str, build_fails: bool) -> None:
        self.bus = bus
        self.replica = replica
        self.build_fails = build_fails
        self.jobs: dict[str, Job] = {}

    def routes(self) -> tuple[Route, ...]:
        return (
            Route(OrderJob, self.order, INTERNAL),
            Route(HaltJob, self.halt, INTERNAL),
            Route(GetJob, self.job, ASKED),
        )

    def storage_routes(self) -> tuple[Route, ...]:
        return Route(ListFiles, self.files, ASKED), Route(GetLog, self.log, ASKED)

    async def order(self, message: OrderJob, unit: Any, call: Any) -> None:
        if message.job_id in self.jobs:
            return
        job = Job(id=message.job_id, team_id=call.team_id, template=message.template)
        if message.template.kind == "replica":
            addresses = {str(message.template.ports[0]): self.replica}
            await self.tell(unit, JobRunning, job, "running", attempt=Attempt(addresses=addresses))
        elif self.build_fails:
            await self.tell(unit, JobFailed, job, "failed", detail="The process ended with 1.")
        else:
            await self.tell(unit, JobSucceeded, job, "succeeded")

    async def halt(self, message: HaltJob, unit: Any, _call: Any) -> None:
        job = self.jobs[message.job_id]
        if job.state == "running":
            await self.tell(unit, JobCancelled, job, "cancelled")

    async def tell(self, unit: Any, event: type[Any], job: Job, state: str, **changes: Any) -> None:
        now = job.model_copy(update={"state": state, "revision": job.revision + 1, **changes})
        self.jobs[job.id] = now
        await unit.emit(event(job=now), team_id=now.team_id, object_id=now.id, revision=now.revision)

    async def job(self, message: GetJob, _unit: Any, _call: Any) -> JobDetail:
        if message.job_id not in self.jobs:
            raise NotFound("job_not_found", "unknown")
        return JobDetail(job=self.jobs[message.job_id])

    async def files(self, message: ListFiles, _unit: Any, _call: Any) -> FilePage:
        fileset = Fileset(id="fs-bento", job_id=message.job_id)
        return FilePage(fileset=fileset, items=(File(path="bento/bento.yaml"),))

    async def log(self, message: GetLog, _unit: Any, _call: Any) -> LogPage:
        return LogPage(lines=(LogLine(sequence=1, text="The model file cannot be loaded"),), complete=True)


@asynccontextmanager
async def peer(nats: NatsServer, name: str, folder: Path, given: Any) -> AsyncIterator[None]:
    """A service of its own on the bus: inbox, outbox relay, and handlers from the fake."""
    url = f"sqlite:///{folder}/{name}.db"
    store = Store(url, ServingUnit, SKELETON, name)
    await migrate(store.writer, "serving")
    bus = nats.bus(name)
    scheduler = given(bus)
    mine = scheduler.routes() if name == "scheduler" else scheduler.storage_routes()
    inbox: Inbox[ServingUnit] = Inbox(store, name)
    listening = Routes(name, mine)
    await nats.provision(listening)
    bus.serve(listening, inbox)
    await bus.broker.connect()
    await bus.start()
    tasks = [asyncio.create_task(loop()) for loop in (inbox.run, Relay(store, bus).run)]
    yield
    await bus.stop()
    await end(tasks, again_s=1.0)
    await store.close()


@asynccontextmanager
async def platform(tmp_path: Path, traefik: Traefik, replica: str, *, build_fails: bool = False) -> AsyncIterator[Bus]:
    """NATS, both peers and serving; yields a bus to ask it as the gateway does."""
    everyone = [
        grant_for(routes()),
        grant_for(Routes("scheduler", (Route(OrderJob, None, INTERNAL),))),  # type: ignore[arg-type]
        grant_for(Routes("storage", ())),
        grant_for(Routes("gateway", (), sends=(CreateDeployment, DeleteDeployment, GetDeployment))),
    ]
    fakes: list[FakeScheduler] = []

    def shared(bus: Bus) -> FakeScheduler:
        fakes.append(fakes[0] if fakes else FakeScheduler(bus, replica, build_fails))
        return fakes[0]

    settings_of = {
        "home": tmp_path / "home",
        "traefik_dynamic": traefik.dynamic,
        "traefik_api": traefik.api,
        "front_door": traefik.url,
        "nats_keys": tmp_path / "nats" / "keys",
        "reconcile_s": 1.0,
    }
    (tmp_path / "home" / "run").mkdir(parents=True)
    (tmp_path / "home" / "run" / "gateway.json").write_text(json.dumps({"http": f"http://{replica}"}))
    with running_nats(tmp_path / "nats", everyone) as nats:
        async with peer(nats, "scheduler", tmp_path, shared), peer(nats, "storage", tmp_path, shared):
            await nats.provision(routes())
            service = build(ServingSettings(nats_url=nats.url, **settings_of))
            async with service.running():
                asking = nats.bus("gateway")
                await asking.start()
                yield asking
                await asking.stop()


@pytest.fixture
def traefik(tmp_path: Path) -> Any:
    with running_traefik(tmp_path / "traefik") as proxy:
        yield proxy


async def until(bus: Bus, *states: str, name: str = "digits") -> Deployment:
    async with asyncio.timeout(90):
        while True:
            found = await bus.ask(GetDeployment(deployment_id=name), Deployment, MEMBER)
            if found.state in states:
                return found
            await asyncio.sleep(0.05)


async def test_a_deployment_is_built_served_and_taken_down(tmp_path: Path, traefik: Traefik) -> None:
    async with (
        echo("replica") as replica,
        platform(tmp_path, traefik, replica) as bus,
        httpx.AsyncClient(base_url=traefik.url, trust_env=False) as client,
    ):
        created = await bus.ask(CREATE, Deployment, MEMBER, key="k1")
        again = await bus.ask(CREATE, Deployment, MEMBER, key="k1")
        assert again == created
        ready = await until(bus, "ready", "failed")
        assert ready.state == "ready", ready.detail
        assert (await client.get(f"{ready.path}/predict")).json()["path"] == "/predict"
        assert (await client.get("/api/v1/health")).json()["server"] == "replica"
        await bus.ask(DeleteDeployment(deployment_id="digits"), Deployment, MEMBER)
        gone = await until(bus, "deleted", name=created.id)
        assert gone.revision.state == "retired"
        assert (await client.get(f"{ready.path}/predict")).status_code == 404


async def test_a_model_that_cannot_be_built_fails_with_its_log(tmp_path: Path, traefik: Traefik) -> None:
    async with echo("replica") as replica, platform(tmp_path, traefik, replica, build_fails=True) as bus:
        await bus.ask(CREATE, Deployment, MEMBER)
        failed = await until(bus, "ready", "failed")
        assert failed.state == "failed"
        assert "ended with 1" in failed.detail
        assert "The model file cannot be loaded" in failed.detail


async def test_its_nats_user_may_order_jobs_and_not_tell_their_fate(tmp_path: Path) -> None:
    grant = grant_for(routes())
    assert subject_for(OrderJob) in grant.publish
    assert f"nabla.evt.*.{JobFailed.ROUTE.type}" not in grant.publish
    assert EVENTS not in " ".join(s for s in grant.publish if "STREAM" in s)


def test_messages_name_their_owner() -> None:
    owners: dict[type[Message], str] = {message: message.ROUTE.owner for message in routes().sends}
    assert set(owners.values()) == {"scheduler", "storage", "executor"}
