"""The REST API: what it asks of whom, and what it refuses before asking."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from libs.common.contracts.messages import (
    CloneJob,
    CreateDeployment,
    CreateProject,
    CreateSignIn,
    CreateToken,
    Deployment,
    Execution,
    ExecutionRunning,
    ExplainJob,
    FilePage,
    Fileset,
    FilesetGrant,
    GetJob,
    GetLog,
    GetModelVersion,
    GetProject,
    GetService,
    Job,
    JobDetail,
    JobExplanation,
    JobPage,
    JobQueued,
    JobTemplate,
    ListFiles,
    ListJobs,
    ListMachines,
    ListNodes,
    LogLine,
    LogPage,
    LogRun,
    MachinePage,
    MachineType,
    ModelVersion,
    Node,
    NodePage,
    OpenFileset,
    Project,
    RegisterModel,
    Resources,
    RetryJob,
    Run,
    ServiceStatus,
    SignIn,
    SubmitJob,
    Token,
)
from libs.common.contracts.messages import DeploymentReady as Ready
from libs.common.errors import Conflict, NotFound, TooLarge
from libs.common.ids import secret_hash
from services.gateway.http.streams import object_event
from services.gateway.ports import StoredEvent
from tests.unit.gateway.fakes import ATTEMPT_TOKEN, BEARER, World, new_world

pytestmark = pytest.mark.unit

JSON = BEARER | {"content-type": "application/json"}
PROJECT = Project(id="pr1", name="digits", state="active", revision=2**53)
DIGEST = {"kind": "workspace", "project_id": "digits", "digest": "d", "files": []}


@pytest.fixture(autouse=True)
def owners(world: World) -> None:
    world.owners.answers |= {
        GetProject: lambda _: PROJECT,
        SubmitJob: lambda message: Job(id="js1", project_id=message.project_id, template=message.template),
        CreateProject: lambda message: Project(id="pr2", name=message.name),
    }


def problem(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert {"type", "title", "status", "detail", "remedy", "code", "trace_id"} <= set(body)
    assert body["status"] == answer.status_code
    assert "Traceback" not in answer.text
    return answer.status_code, body["code"]


async def test_a_job_goes_to_the_resolved_project_with_the_clients_key(client: httpx.AsyncClient, world: World) -> None:
    body = {"project_id": "digits", "template": {"command": ["echo hi"]}}
    answer = await client.post("/api/v1/jobs", json=body, headers=BEARER | {"Idempotency-Key": "k1"})
    assert answer.status_code == 201
    assert answer.json()["project_id"] == "pr1"
    asked = world.owners.asked[-1]
    assert asked.message == SubmitJob(project_id="pr1", template=JobTemplate(command=("echo hi",)))
    assert (asked.key, asked.principal.id) == ("k1", "u1")


async def test_a_request_without_a_key_gets_one_of_its_own(client: httpx.AsyncClient, world: World) -> None:
    for _ in range(2):
        await client.post("/api/v1/projects", json={"name": "a"}, headers=BEARER)
    keys = {each.key for each in world.owners.asked if isinstance(each.message, CreateProject)}
    assert len(keys) == 2
    assert "" not in keys


@pytest.mark.parametrize("key", ["", "with space", "x" * 256, "tab\there"])
async def test_a_key_that_cannot_be_one_is_refused(client: httpx.AsyncClient, key: str) -> None:
    answer = await client.post("/api/v1/projects", json={"name": "a"}, headers=BEARER | {"Idempotency-Key": key})
    assert problem(answer) == (422, "invalid_request")


@pytest.mark.parametrize("state", ["archived", "deleted"])
async def test_nothing_is_added_to_a_project_that_is_not_active(
    client: httpx.AsyncClient, world: World, state: str
) -> None:
    world.owners.answers[GetProject] = lambda _: PROJECT.model_copy(update={"state": state})
    answer = await client.post("/api/v1/jobs", json={"project_id": "digits", "template": {}}, headers=BEARER)
    assert problem(answer) == (409, f"project_{state}")
    assert answer.json()["project_id"] == "pr1"


async def test_a_running_job_that_names_no_project_means_its_own(client: httpx.AsyncClient, world: World) -> None:
    headers = {"Authorization": f"Bearer {ATTEMPT_TOKEN}"}
    await client.post("/api/v1/jobs", json={"template": {}}, headers=headers)
    assert world.owners.of(GetProject) == [GetProject(project_id="pr1")]


async def test_anybody_may_know_which_installation_answers(tmp_path: Path) -> None:
    transport = httpx.ASGITransport(new_world(tmp_path, installation_id="0a1b").app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
        assert (await client.get("/api/v1/health")).json() == {"status": "ok", "installation_id": "0a1b"}


async def test_a_person_who_names_no_project_is_told_so(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/v1/jobs", json={"template": {}}, headers=BEARER)
    assert problem(answer) == (422, "project_missing")


async def test_an_owners_refusal_keeps_its_words_and_its_facts(client: httpx.AsyncClient, world: World) -> None:
    def taken(_: CreateProject) -> Project:
        raise Conflict("project_exists", "The name is taken.", "Pick another.", project_id="pr9", status=1)

    world.owners.answers[CreateProject] = taken
    answer = await client.post("/api/v1/projects", json={"name": "a"}, headers=BEARER)
    assert problem(answer) == (409, "project_exists")
    assert answer.json()["project_id"] == "pr9"


async def test_an_error_of_ours_tells_nothing_of_our_insides(client: httpx.AsyncClient, world: World) -> None:
    def broken(_: CreateProject) -> Project:
        raise RuntimeError("password=hunter2")

    world.owners.answers[CreateProject] = broken
    answer = await client.post("/api/v1/projects", json={"name": "a"}, headers=BEARER)
    assert problem(answer) == (500, "internal")
    assert "hunter2" not in answer.text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"name": "a", "id": "pr666"}, "'id' is not a field"),
        ({"name": "a", "team_id": "t2"}, "'team_id' is not a field"),
        ({"nam": "a"}, "did you mean 'name'"),
        ({"name": "a\0b"}, "NUL"),
        ({"name": 5}, "name"),
        ({"name": None}, "name"),
        ([], "body"),
        ("x", "body"),
    ],
)
async def test_a_body_with_anything_else_in_it_is_refused(client: httpx.AsyncClient, body: Any, said: str) -> None:
    answer = await client.post("/api/v1/projects", json=body, headers=BEARER)
    assert problem(answer) == (422, "invalid_request")
    assert said in answer.json()["detail"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({"comand": ["x"]}, "template.comand"),
        ({"resources": {"cpus": 1}}, "template.resources.cpus"),
        ({"inputs": [{"fileset_id": "a", "evil": 1}]}, "template.inputs.evil"),
        ({"env": {"A": "a\0b"}}, "NUL"),
        ({"env": {"A\0": "b"}}, "NUL"),
        ({"resources": {"memory_bytes": 2**64}}, "64 bits"),
        ({"max_retries": 10**400}, "64 bits"),
        ({"timeout_s": "1e999"}, ""),
    ],
)
async def test_strays_are_found_at_every_depth(client: httpx.AsyncClient, template: Any, said: str) -> None:
    content = json.dumps({"project_id": "digits", "template": template}).replace('"1e999"', "1e999")
    answer = await client.post("/api/v1/jobs", content=content, headers=JSON)
    assert problem(answer) == (422, "invalid_request")
    assert said in answer.json()["detail"]


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b'{"name": NaN}',
        b'{"name": Infinity}',
        b"\xff\xfe",
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"name": ' + b"1" * 6000 + b"}",
        b'{"name": "\\ud800"}',
    ],
)
async def test_what_is_not_json_is_a_problem_and_never_an_error_of_ours(
    client: httpx.AsyncClient, content: bytes
) -> None:
    answer = await client.post("/api/v1/projects", content=content, headers=JSON)
    assert problem(answer) == (400, "invalid_json")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_only_json_is_taken_as_json(client: httpx.AsyncClient, world: World, kind: str) -> None:
    answer = await client.post("/api/v1/projects", content=b'{"name":"a"}', headers=BEARER | {"content-type": kind})
    assert problem(answer)[0] == 422
    assert world.owners.of(CreateProject) == []


async def test_bodies_are_bounded_and_those_of_file_sets_less_tightly(client: httpx.AsyncClient, world: World) -> None:
    world.owners.answers[OpenFileset] = lambda _: FilesetGrant()
    large = {"path": "p", "sha256": "s" * 64}
    body = json.dumps(DIGEST | {"files": [large] * 30_000}).encode()
    assert 2_000_000 < len(body) < 8_000_000
    assert (await client.post("/api/v1/filesets", content=body, headers=JSON)).status_code == 201
    assert problem(await client.post("/api/v1/jobs", content=body, headers=JSON)) == (413, "body_too_large")
    too_large = b'"' + b"x" * 8_000_001 + b'"'
    assert problem(await client.post("/api/v1/filesets", content=too_large, headers=JSON)) == (413, "body_too_large")


async def test_a_body_without_a_length_is_bounded_while_it_comes(client: httpx.AsyncClient) -> None:
    async def endless() -> Any:
        while True:
            yield b"x" * 100_000

    answer = await client.post("/api/v1/projects", content=endless(), headers=JSON)
    assert problem(answer) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/api/v1/nothing", (404, "not_found")),
        ("PUT", "/api/v1/projects", (405, "method_not_allowed")),
        ("GET", "/api/v1/jobs/..%2f..%2fetc", (404, "not_found")),
        ("GET", "/api/v1/jobs/a%00b", (422, "invalid_request")),
        ("GET", "/api/v1/projects/a%00b", (422, "invalid_request")),
        ("GET", "/api/v1/jobs?limit=0", (422, "invalid_request")),
        ("GET", "/api/v1/jobs?limit=501", (422, "invalid_request")),
        ("GET", "/api/v1/jobs?cursor=%00", (422, "invalid_request")),
        ("GET", "/api/v1/jobs/js1/logs?after=x", (422, "invalid_request")),
        ("GET", "/api/v1/models/digits/versions/99999999999", (422, "invalid_request")),
    ],
)
async def test_every_refusal_is_a_problem_document(
    client: httpx.AsyncClient, method: str, path: str, expected: tuple[int, str]
) -> None:
    assert problem(await client.request(method, path, headers=BEARER)) == expected


async def test_large_numbers_are_json_numbers_and_times_are_utc(client: httpx.AsyncClient, world: World) -> None:
    world.owners.answers[GetProject] = lambda _: PROJECT.model_copy(
        update={"created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)}
    )
    body = (await client.get("/api/v1/projects/digits", headers=BEARER)).json()
    assert body["revision"] == 2**53
    assert body["created_at"] == "2026-01-02T03:04:05Z"


async def test_names_in_filters_are_resolved_and_ids_are_taken_as_they_are(
    client: httpx.AsyncClient, world: World
) -> None:
    world.owners.answers[ListJobs] = lambda _: JobPage()
    await client.get("/api/v1/jobs?project_id=digits", headers=BEARER)
    project_id = "pr" + "0" * 26
    await client.get(f"/api/v1/jobs?project_id={project_id}", headers=BEARER)
    assert [each.project_id for each in world.owners.of(ListJobs)] == ["pr1", project_id]
    assert len(world.owners.of(GetProject)) == 1


async def test_a_repeated_token_request_answers_the_same_secret(client: httpx.AsyncClient, world: World) -> None:
    world.owners.answers[CreateToken] = lambda message: Token(id="tk1", name=message.name)
    secrets = [
        (await client.post("/api/v1/tokens", json={"name": "a"}, headers=BEARER | {"Idempotency-Key": key})).json()
        for key in ("k1", "k1", "k2")
    ]
    assert secrets[0]["secret"] == secrets[1]["secret"] != secrets[2]["secret"]
    assert secrets[0]["secret"].startswith("nbl_")
    assert world.owners.of(CreateToken)[0].token_hash == secret_hash(secrets[0]["secret"])


async def test_a_sign_in_link_leads_to_the_interface_by_the_port_in_use(
    client: httpx.AsyncClient, world: World
) -> None:
    world.owners.answers[CreateSignIn] = lambda _: SignIn(id="si1")
    answer = await client.post("/api/v1/sign-in-links", headers=BEARER | {"host": "127.0.0.1:9999"})
    url = answer.json()["url"]
    assert url.startswith("http://localhost:9999/sign-in?code=")
    assert world.owners.of(CreateSignIn)[0].code_hash == secret_hash(url.partition("code=")[2])


@pytest.mark.parametrize(("host", "endpoint"), [("127.0.0.1:7", "127.0.0.1:7"), ("localhost:7", "127.0.0.1:7")])
async def test_links_to_files_are_made_for_another_origin_than_the_interface(
    client: httpx.AsyncClient, world: World, host: str, endpoint: str
) -> None:
    files = FilePage(fileset=Fileset(id="fs1"))
    world.owners.answers |= {ListFiles: lambda _: files, OpenFileset: lambda _: FilesetGrant()}
    headers = BEARER | {"host": host}
    await client.get("/api/v1/jobs/js1/artifacts", headers=headers)
    await client.post("/api/v1/filesets", json=DIGEST, headers=headers)
    assert world.owners.of(ListFiles)[0].endpoint == endpoint
    assert world.owners.of(OpenFileset)[0].endpoint == endpoint


async def test_a_model_is_registered_with_what_its_owner_looks_up_itself(
    client: httpx.AsyncClient, world: World
) -> None:
    world.owners.answers[RegisterModel] = lambda _: ModelVersion(version=1)
    body = {"project_id": "digits", "fileset_id": "fs1", "framework": "sklearn"}
    assert (await client.post("/api/v1/models/digits/versions", json=body, headers=BEARER)).status_code == 201
    [message] = world.owners.of(RegisterModel)
    assert message == RegisterModel(name="digits", project_id="pr1", fileset_id="fs1", framework="sklearn")
    answer = await client.post("/api/v1/models/digits/versions", json=body | {"size_bytes": 5}, headers=BEARER)
    assert problem(answer)[0] == 422


@pytest.mark.parametrize(("model", "version"), [("digits", 0), ("digits:3", 3)])
async def test_a_deployment_carries_what_the_registry_says_of_the_model(
    client: httpx.AsyncClient, world: World, model: str, version: int
) -> None:
    found = ModelVersion(model_id="mo1", model_name="digits", version=3, framework="sklearn", fileset_id="fs1")
    world.owners.answers |= {
        GetModelVersion: lambda _: found.model_copy(update={"project_id": "pr1"}),
        CreateDeployment: lambda message: Deployment(id="de1", name=message.name),
    }
    answer = await client.post("/api/v1/deployments", json={"name": "d", "model": model}, headers=BEARER)
    assert answer.status_code == 201
    assert world.owners.of(GetModelVersion)[0].version == version
    message = world.owners.of(CreateDeployment)[0]
    assert (message.model_id, message.model_version, message.model_fileset_id) == ("mo1", 3, "fs1")


async def test_a_deployment_takes_what_its_machine_type_has_and_what_was_said_over_it(
    client: httpx.AsyncClient, world: World
) -> None:
    found = ModelVersion(model_id="mo1", model_name="digits", version=3, project_id="pr1", fileset_id="fs1")
    shape = Resources(cpu_count=4, memory_bytes=8 << 30, gpu_count=1, gpu_model="H100")
    world.owners.answers |= {
        GetModelVersion: lambda _: found,
        ListMachines: lambda _: MachinePage(items=(MachineType(name="gpu-h100-1", resources=shape),)),
        CreateDeployment: lambda message: Deployment(id="de1", name=message.name),
    }
    body = {"name": "d", "model": "digits", "machine_type": "gpu-h100-1", "resources": {"cpu_count": 2}}
    assert (await client.post("/api/v1/deployments", json=body, headers=BEARER)).status_code == 201
    assert world.owners.of(CreateDeployment)[0].resources == shape.model_copy(update={"cpu_count": 2})
    answer = await client.post("/api/v1/deployments", json=body | {"machine_type": "moon-1"}, headers=BEARER)
    assert problem(answer) == (422, "bad_machine_type")
    assert "gpu-h100-1" in answer.json()["detail"]
    assert len(world.owners.of(CreateDeployment)) == 1


@pytest.mark.parametrize("model", ["digits:x", "digits:0", "digits:-1", "digits:", "digits:9999999999", "d:1:2"])
async def test_a_version_that_is_no_number_is_refused(client: httpx.AsyncClient, model: str) -> None:
    answer = await client.post("/api/v1/deployments", json={"name": "d", "model": model}, headers=BEARER)
    assert problem(answer) == (422, "bad_model_version")


async def test_metrics_carry_the_tokens_attempt_and_never_the_bodys(client: httpx.AsyncClient, world: World) -> None:
    world.owners.answers[LogRun] = lambda _: Run(job_id="js1")
    headers = {"Authorization": f"Bearer {ATTEMPT_TOKEN}"}
    body: dict[str, Any] = {"points": [{"name": "loss", "value": 0.5, "step": 3}]}
    assert (await client.post("/api/v1/jobs/js1/metrics", json=body, headers=headers)).status_code == 200
    assert world.owners.of(LogRun)[0].attempt == 2
    answer = await client.post("/api/v1/jobs/js1/metrics", json=body | {"attempt": 9}, headers=headers)
    assert problem(answer)[0] == 422


async def test_status_says_who_is_silent_and_gives_the_weakest_isolation(
    client: httpx.AsyncClient, world: World
) -> None:
    nodes = (Node(id="a", isolation="bwrap"), Node(id="b", isolation="process", isolation_detail="no namespaces"))
    world.owners.answers[ListNodes] = lambda _: NodePage(items=nodes)
    body = (await client.get("/api/v1/status", headers=BEARER)).json()
    assert [each["ready"] for each in body["services"]] == [False] * 6
    assert (body["isolation"], body["isolation_detail"]) == ("process", "no namespaces")
    world.owners.answers[GetService] = lambda _: ServiceStatus(name="x", ready=True)
    body = (await client.get("/api/v1/status", headers=BEARER)).json()
    assert all(each["ready"] for each in body["services"])


async def test_a_finished_jobs_stream_has_its_state_every_line_and_an_end(
    client: httpx.AsyncClient, world: World
) -> None:
    job = Job(id="js1", team_id="t1", state="failed", revision=4)
    lines = tuple(LogLine(sequence=each, text=f"{each}\nb") for each in range(1, 4))
    world.owners.answers |= {
        GetJob: lambda _: JobDetail(job=job),
        GetLog: lambda question: LogPage(
            lines=tuple(line for line in lines if line.sequence > question.after), complete=True, last_sequence=3
        ),
    }
    answer = await client.get("/api/v1/jobs/js1/logs/stream", headers=BEARER | {"Last-Event-ID": "1"})
    events = [dict(line.split(": ", 1) for line in block.split("\n")) for block in answer.text.strip().split("\n\n")]
    assert [(event["event"], event.get("id")) for event in events] == [
        ("state", None),
        ("line", "2"),
        ("line", "3"),
        ("end", None),
    ]
    assert json.loads(events[1]["data"])["text"] == "2\nb"
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("part", ["logs", "artifacts"])
async def test_what_a_job_left_is_empty_for_a_new_job_and_not_found_for_a_mistyped_one(
    client: httpx.AsyncClient, world: World, part: str
) -> None:
    def known(question: GetJob) -> JobDetail:
        if question.job_id != "js1":
            raise NotFound("job_not_found", "There is no such job.", "Look at `nabla jobs list`.")
        return JobDetail(job=Job(id="js1"))

    world.owners.answers |= {GetJob: known, GetLog: lambda _: LogPage(), ListFiles: lambda _: FilePage()}
    assert (await client.get(f"/api/v1/jobs/js1/{part}", headers=BEARER)).status_code == 200
    assert problem(await client.get(f"/api/v1/jobs/js2/{part}", headers=BEARER)) == (404, "job_not_found")


async def test_a_stream_of_a_job_that_is_not_there_is_a_problem(client: httpx.AsyncClient, world: World) -> None:
    def missing(_: GetJob) -> JobDetail:
        raise NotFound("job_not_found", "There is no such job.", "Look at `nabla jobs list`.")

    world.owners.answers[GetJob] = missing
    assert problem(await client.get("/api/v1/jobs/js1/logs/stream", headers=BEARER)) == (404, "job_not_found")


@pytest.mark.parametrize("last_id", ["x", "-1", "1.5", "99999999999999999999", "²"])
async def test_a_last_event_id_that_is_not_ours_is_refused(client: httpx.AsyncClient, last_id: str) -> None:
    headers: dict[str, Any] = BEARER | {"Last-Event-ID": last_id.encode()}
    assert problem(await client.get("/api/v1/events/stream", headers=headers))[0] == 422


def test_events_for_clients_have_plain_numbers_and_no_endpoint_token() -> None:
    body = JobQueued(job=Job(id="js1", revision=7)).to_wire()
    shown = object_event(StoredEvent(5, "job.queued", "js1", "pr1", body)).decode()
    assert "id: 5" in shown
    assert "event: job.queued" in shown
    assert '"revision":7' in shown
    ready = Ready(deployment=Deployment(id="de1", endpoint_token="nble_secret")).to_wire()
    assert "nble_secret" not in object_event(StoredEvent(6, "deployment.ready", "de1", "pr1", ready)).decode()


def test_an_event_that_cannot_be_read_or_is_unknown_is_left_out() -> None:
    assert object_event(StoredEvent(1, "job.queued", "x", "", b"{")) == b""
    assert object_event(StoredEvent(1, "job.levitated", "x", "", b"{}")) == b""
    running = ExecutionRunning(execution=Execution(attempt_id="at1")).to_wire()
    assert object_event(StoredEvent(1, "execution.running", "x", "", running)) != b""


async def test_a_body_larger_than_the_bus_carries_is_too_large(client: httpx.AsyncClient, world: World) -> None:
    def full(_: SubmitJob) -> Job:
        raise TooLarge("message_too_large", "The request is larger than the bus carries.", "Send less.")

    world.owners.answers[SubmitJob] = full
    answer = await client.post("/api/v1/jobs", json={"project_id": "a", "template": {}}, headers=BEARER)
    assert problem(answer) == (413, "message_too_large")


async def test_a_job_is_explained_repeated_and_changed(client: httpx.AsyncClient, world: World) -> None:
    world.owners.answers |= {
        ExplainJob: lambda message: JobExplanation(job_id=message.job_id, summary="It waits."),
        RetryJob: lambda message: Job(id="js2"),
        CloneJob: lambda message: Job(id="js3"),
        ListMachines: lambda _: MachinePage(items=(MachineType(name="cpu-1"),)),
    }
    assert (await client.get("/api/v1/jobs/js1/explain", headers=BEARER)).json()["summary"] == "It waits."
    assert (await client.post("/api/v1/jobs/js1/retry", headers=BEARER)).status_code == 201
    body = {"command": ["a", "b"], "env": {"A": "1"}, "priority": 0, "resources": {"cpu_count": 2}}
    made = await client.post("/api/v1/jobs/js1/clone", headers=JSON, content=json.dumps(body))
    assert (made.status_code, made.json()["id"]) == (201, "js3")
    asked = world.owners.of(CloneJob)[0]
    assert (asked.job_id, asked.command, asked.priority, asked.timeout_s) == ("js1", ("a", "b"), 0, None)
    assert asked.resources.cpu_count == 2
    wrong = await client.post("/api/v1/jobs/js1/clone", headers=JSON, content=json.dumps({"comand": ["a"]}))
    assert problem(wrong)[0] in {400, 422}
    assert (await client.get("/api/v1/machines", headers=BEARER)).json()["items"][0]["name"] == "cpu-1"
