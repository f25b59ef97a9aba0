"""The gateway on a real NATS server, with its own permissions there, over real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from infra.local.nats import Grant, gateway_extra, grant_for
from libs.common.clock import utc_now
from libs.common.contracts.envelope import ANSWER_OK, ANSWER_REFUSED, STATUS_HEADER, Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    AuthenticateToken,
    CreateProject,
    GetJob,
    GetLog,
    GetProject,
    GetService,
    Job,
    JobDetail,
    JobQueued,
    JobSucceeded,
    LogLine,
    LogPage,
    Principal,
    Project,
    ProjectCreated,
    ServiceStatus,
    TokenRevoked,
)
from libs.common.contracts.problem import problem_of
from libs.common.contracts.subjects import EVENTS, subject_for, tail_subject
from libs.common.errors import Refusal, Unauthenticated
from libs.common.ids import new_id, secret_hash
from libs.common.waiting import end
from services.gateway.app import Gateway, build
from services.gateway.routes import routes
from services.gateway.settings import GatewaySettings
from tests.support.nats import NatsServer, running_nats

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

TEAM = "t1"
TOKEN = "nbl_ada"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
ADA = Principal(kind="user", id="u1", name="Ada Lovelace", team_id=TEAM, role="member")
JOB = Job(id="js1", team_id=TEAM, project_id="pr1", state="running", revision=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    owners = Grant("owners", publish=(">",), subscribe=(">",), answers=True)
    folder = tmp_path_factory.mktemp("nats")
    with running_nats(folder, [grant_for(routes()), gateway_extra(), owners]) as running:
        yield running


@dataclass
class Owners:
    """Every other service, in a dictionary."""

    client: Client
    answers: dict[str, Callable[[Any], Message]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    lines: list[LogLine] = field(default_factory=list)
    job: Job = JOB
    complete: bool = False
    valid: bool = True

    def on(self, kind: type[Message], answer: Callable[[Any], Message]) -> None:
        self.answers[kind.ROUTE.type] = lambda body: answer(kind.from_wire(body))

    async def answer(self, message: Msg) -> None:
        envelope = Envelope.parse(message.headers or {})
        self.asked.append(envelope.type)
        given = self.answers.get(envelope.type)
        if given is None:
            return
        try:
            body, status = given(message.data).to_wire(), ANSWER_OK
        except Refusal as refusal:
            body, status = problem_of(refusal).model_dump_json().encode(), ANSWER_REFUSED
        await self.client.publish(message.reply, body, headers={STATUS_HEADER: status})

    def log(self, question: GetLog) -> LogPage:
        found = [line for line in self.lines if line.sequence > question.after][: question.limit]
        return LogPage(lines=tuple(found), complete=self.complete, last_sequence=len(self.lines))

    async def write(self, count: int, *, tell: bool = True) -> None:
        start = len(self.lines)
        fresh = tuple(LogLine(sequence=start + n + 1, text=f"line {start + n + 1}") for n in range(count))
        self.lines += fresh
        if tell:
            await self.client.publish(tail_subject(TEAM, "js1"), LogPage(lines=fresh).to_wire())

    async def emit(self, event: Message, object_id: str, team: str = TEAM) -> None:
        envelope = Envelope(new_id("event"), event.ROUTE.type, "owners", utc_now(), object_id, team, "pr1")
        subject = subject_for(type(event), team=team)
        await self.client.jetstream().publish(subject, event.to_wire(), stream=EVENTS, headers=envelope.headers())

    async def end_job(self) -> None:
        self.job = self.job.model_copy(update={"state": "succeeded", "revision": self.job.revision + 1})
        self.complete = True
        await self.emit(JobSucceeded(job=self.job), "js1")

    def authenticate(self, question: AuthenticateToken) -> Principal:
        if not self.valid or question.token_hash != secret_hash(TOKEN):
            raise Unauthenticated("token_invalid", "No.", "Sign in.")
        return ADA


@pytest.fixture
async def owners(server: NatsServer) -> AsyncIterator[Owners]:
    await server.provision()
    client = await nats.connect(server.url, nkeys_seed_str=server.seed("owners"), max_reconnect_attempts=-1)
    found = Owners(client)
    found.on(AuthenticateToken, found.authenticate)
    found.on(GetJob, lambda _: JobDetail(job=found.job))
    found.on(GetLog, found.log)
    found.on(GetProject, lambda _: Project(id="pr1", name="digits", state="active"))
    for kind in ("req", "qry"):
        for name in ("registry", "scheduler", "storage"):
            await client.subscribe(f"nabla.{kind}.{name}.>", cb=found.answer)
    await client.flush()
    yield found
    await client.close()


@pytest.fixture
async def gateway(server: NatsServer, owners: Owners, tmp_path: Path) -> AsyncIterator[Gateway]:
    settings = GatewaySettings(home=tmp_path, nats_url=server.url, nats_keys=server.folder / "keys")
    built = build(settings)
    async with built.running():
        yield built


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    address = json.loads((gateway.settings.home / "run" / "gateway.json").read_text())["http"]
    async with httpx.AsyncClient(base_url=address, headers=BEARER, timeout=10) as client:
        yield client


@asynccontextmanager
async def events(client: httpx.AsyncClient, path: str, after: str = "") -> AsyncIterator[AsyncIterator[dict[str, str]]]:
    headers = {"Last-Event-ID": after} if after else {}
    async with client.stream("GET", path, headers=headers) as answer:
        assert answer.status_code == 200
        yield _parsed(answer)


async def _parsed(answer: httpx.Response) -> AsyncIterator[dict[str, str]]:
    event: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if not line and event:
            yield event
            event = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = value


async def _until_blank(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if not line:
            return
        yield line


async def take(source: AsyncIterator[dict[str, str]], count: int, name: str = "") -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    async with asyncio.timeout(60):
        async for event in source:
            if "event" in event and name in ("", event["event"]):
                found.append(event)
            if len(found) == count:
                break
    return found


async def until(true: Callable[[], bool]) -> None:
    """Waits for what happens soon, and fails when it does not."""
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.05)


async def test_a_request_reaches_its_owner_under_the_gateways_own_permissions(
    client: httpx.AsyncClient, owners: Owners, gateway: Gateway
) -> None:
    owners.on(CreateProject, lambda message: Project(id="pr2", name=message.name))
    answer = await client.post("/api/v1/projects", json={"name": "Zürich"})
    assert (answer.status_code, answer.json()["name"]) == (201, "Zürich")
    known = json.loads((gateway.settings.home / "run" / "gateway.json").read_text())
    metrics = (await client.get(known["metrics"])).text
    assert known["http"] == str(client.base_url).rstrip("/")
    assert "python_info" in metrics


@pytest.mark.full
async def test_a_silent_owner_is_asked_once_more_with_the_same_key(client: httpx.AsyncClient, owners: Owners) -> None:
    answer = await client.post("/api/v1/projects", json={"name": "a"}, headers={"Idempotency-Key": "k"}, timeout=20)
    assert (answer.status_code, answer.json()["code"]) == (503, "service_silent")
    assert owners.asked.count(CreateProject.ROUTE.type) == 2


async def test_it_answers_on_the_bus_how_it_is(gateway: Gateway, owners: Owners) -> None:
    envelope = Envelope(new_id("event"), GetService.ROUTE.type, "owners", utc_now(), sender=ADA)
    subject = subject_for(GetService, service="gateway")
    answer = await owners.client.request(subject, b"{}", timeout=5, headers=envelope.headers())
    assert ServiceStatus.from_wire(answer.data).name == "gateway"


async def test_a_log_is_followed_live_cut_off_and_resumed_without_a_gap_or_a_repeat(
    client: httpx.AsyncClient, owners: Owners
) -> None:
    await owners.write(1200)
    seen: list[str] = []
    async with events(client, "/api/v1/jobs/js1/logs/stream") as source:
        seen += [event["id"] for event in await take(source, 1100, "line")]
    await owners.write(50, tell=False)
    async with events(client, "/api/v1/jobs/js1/logs/stream", after=seen[-1]) as source:
        seen += [event["id"] for event in await take(source, 100, "line")]
        for _ in range(20):
            await owners.write(10)
        await owners.write(5, tell=False)
        await owners.write(5)
        await owners.end_job()
        rest = await take(source, 10_000)
    seen += [event["id"] for event in rest if event["event"] == "line"]
    assert seen == [str(number) for number in range(1, len(owners.lines) + 1)]
    assert rest[-1]["event"] == "end"
    assert json.loads(rest[-1]["data"])["state"] == "succeeded"


async def test_a_live_line_arrives_without_a_look_at_the_log(
    server: NatsServer, owners: Owners, tmp_path: Path
) -> None:
    settings = GatewaySettings(
        home=tmp_path, nats_url=server.url, nats_keys=server.folder / "keys", follow_poll_s=300.0
    )
    gateway = build(settings)
    async with gateway.running():
        address = json.loads((tmp_path / "run" / "gateway.json").read_text())["http"]
        async with (
            httpx.AsyncClient(base_url=address, headers=BEARER, timeout=30) as client,
            events(client, "/api/v1/jobs/js1/logs/stream") as source,
        ):
            await take(source, 1, "state")
            # Asked about before the stream began and again after the log was read: from now on it listens.
            await until(lambda: owners.asked.count(GetJob.ROUTE.type) >= 2)
            del owners.answers[GetLog.ROUTE.type]
            await owners.write(1)
            await take(source, 1, "line")


async def test_followers_of_one_job_share_their_subscriptions(
    client: httpx.AsyncClient, owners: Owners, gateway: Gateway
) -> None:
    own = gateway.hints.subscription_count
    path = "/api/v1/jobs/js1/logs/stream"
    async with events(client, path) as one, events(client, path) as two, events(client, path) as three:
        for source in (one, two, three):
            await take(source, 1, "state")
        await until(lambda: gateway.hints.subscription_count == own + 3)
        await owners.write(3)
        for source in (one, two, three):
            assert [event["id"] for event in await take(source, 3, "line")] == ["1", "2", "3"]
        assert gateway.hints.subscription_count == own + 3
    await until(lambda: gateway.hints.subscription_count == own)


async def test_what_nobody_hears_any_more_is_not_subscribed_again_after_an_outage(
    gateway: Gateway, owners: Owners, server: NatsServer
) -> None:
    subject = tail_subject(TEAM, "js7")
    async with gateway.hints.listen(subject):
        server.kill()
        await until(lambda: not gateway.bus.connected)
    server.start()
    await until(lambda: gateway.bus.connected and owners.client.is_connected)
    assert subject not in {each.subject for each in gateway.bus.client._subs.values()}


async def test_object_events_are_followed_filtered_and_resumed(client: httpx.AsyncClient, owners: Owners) -> None:
    path = "/api/v1/events/stream"
    async with events(client, f"{path}?types=job.,project.") as source:
        await owners.emit(JobQueued(job=JOB), "js1")
        await owners.emit(TokenRevoked(token_id="tk1"), "tk1")
        await owners.emit(JobQueued(job=JOB), "js9", team="t2")
        await owners.emit(ProjectCreated(project=Project(id="pr7")), "pr7")
        found = await take(source, 2)
    assert [event["event"] for event in found] == ["job.queued", "project.created"]
    assert json.loads(found[0]["data"])["job"]["revision"] == 1
    await owners.emit(JobQueued(job=JOB), "js2")
    async with events(client, f"{path}?object_id=js2", after=found[0]["id"]) as source:
        assert len(await take(source, 1, "job.queued")) == 1


async def test_who_is_cut_off_before_the_first_event_misses_none(client: httpx.AsyncClient, owners: Owners) -> None:
    path = "/api/v1/events/stream"
    async with client.stream("GET", path) as answer:
        [first] = [line async for line in _until_blank(answer)]
    name, _, start = first.partition(": ")
    assert name == "id"
    await owners.emit(JobQueued(job=JOB), "js5")
    async with events(client, path, after=start) as source:
        assert json.loads((await take(source, 1, "job.queued"))[0]["data"])["job"]["id"] == "js1"


async def test_following_events_survives_a_restart_of_nats(
    client: httpx.AsyncClient, owners: Owners, server: NatsServer
) -> None:
    async with events(client, "/api/v1/events/stream") as source:
        await owners.emit(JobQueued(job=JOB), "before")
        first = await take(source, 1)
        server.kill()
        await until(lambda: not owners.client.is_connected)
        server.start()
        await until(lambda: owners.client.is_connected)
        await owners.emit(JobQueued(job=JOB.model_copy(update={"id": "after"})), "after")
        second = await take(source, 1)
    assert int(second[0]["id"]) > int(first[0]["id"])
    assert json.loads(second[0]["data"])["job"]["id"] == "after"


async def test_a_revoked_token_is_refused_at_once(client: httpx.AsyncClient, owners: Owners) -> None:
    assert (await client.get("/api/v1/whoami")).status_code == 200
    owners.valid = False
    assert (await client.get("/api/v1/whoami")).status_code == 200
    await owners.emit(TokenRevoked(token_id="tk1", token_hash=secret_hash(TOKEN)), "tk1")
    async with asyncio.timeout(60):
        while (await client.get("/api/v1/whoami")).status_code != 401:
            await asyncio.sleep(0.02)


async def test_it_answers_before_the_bus_is_there(tmp_path: Path) -> None:
    gateway = build(GatewaySettings(home=tmp_path, nats_url="nats://127.0.0.1:1"))

    async def run() -> None:
        async with gateway.running():
            await asyncio.Event().wait()

    running = asyncio.create_task(run())
    file = tmp_path / "run" / "gateway.json"
    await until(lambda: file.exists() and '"http"' in file.read_text())
    async with httpx.AsyncClient(base_url=json.loads(file.read_text())["http"]) as client:
        assert (await client.get("/api/v1/health")).json() == {"status": "ok", "installation_id": ""}
        answer = await client.get("/api/v1/whoami", headers=BEARER)
        assert (answer.status_code, answer.json()["code"]) == (503, "bus_not_connected")
    await end([running], again_s=1.0)


async def test_it_stops_though_clients_follow_and_their_streams_end_whole(
    server: NatsServer, owners: Owners, tmp_path: Path
) -> None:
    gateway = build(GatewaySettings(home=tmp_path, nats_url=server.url, nats_keys=server.folder / "keys"))
    async with gateway.running():
        address = json.loads((tmp_path / "run" / "gateway.json").read_text())["http"]
        client = httpx.AsyncClient(base_url=address, headers=BEARER, timeout=20)
        open_stream = client.stream("GET", "/api/v1/jobs/js1/logs/stream")
        answer = await open_stream.__aenter__()
        following = _parsed(answer)
        await take(following, 1, "state")
    # Cut off, it would raise: its client would not know that nothing is missing.
    assert [event async for event in following if "data" in event] == []
    await client.aclose()
