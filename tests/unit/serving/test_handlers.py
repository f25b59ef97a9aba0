"""Serving's handlers on a real store, each message delivered twice."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from libs.common.contracts.envelope import ANSWER_CREATED, ANSWER_DUPLICATE
from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    Attempt,
    DeleteDeployment,
    Deployment,
    DeploymentPage,
    GetDeployment,
    Job,
    JobCancelled,
    JobFailed,
    JobQueued,
    JobRunning,
    JobStarting,
    JobSucceeded,
    JobTimedOut,
    ListDeployments,
    Resources,
)
from libs.common.errors import Conflict, Forbidden, Invalid, NotFound
from libs.common.ids import secret_hash
from libs.common.inbox import Answer, Inbox
from libs.common.waiting import end
from services.serving.adapters.vault import BrokenSeal, FileKeyVault
from tests.support.serving import CREATE, MEMBER, STRANGER, VIEWER, Serving, envelope_for, serving_on

pytestmark = pytest.mark.unit


@pytest.fixture
async def serving(tmp_path: Path, database_url: str) -> AsyncIterator[Serving]:
    async with serving_on(database_url, tmp_path) as service:
        yield service


@asynccontextmanager
async def inbox_of(serving: Serving) -> AsyncIterator[Inbox]:
    inbox = Inbox(serving.store, "serving")
    task = asyncio.create_task(inbox.run())
    try:
        yield inbox
    finally:
        await end([task], again_s=1.0)


async def deliver_twice(serving: Serving, message: Message, key: str = "") -> tuple[Answer, Answer]:
    envelope = envelope_for(message, MEMBER, key)
    async with inbox_of(serving) as inbox:
        first = await inbox.apply(serving.route(message), message, envelope)
        second = await inbox.apply(serving.route(message), message, envelope)
    return first, second


async def test_creating_twice_makes_one_deployment_and_orders_one_build(serving: Serving) -> None:
    first, second = await deliver_twice(serving, CREATE, key="k1")
    assert (first.status, second.status) == (ANSWER_CREATED, ANSWER_DUPLICATE)
    assert first.body == second.body
    assert await serving.types() == ["job.order", "deployment.created"]
    created = Deployment.from_wire(first.body)
    assert (created.state, created.path, created.host) == ("building", "/d/digits", "digits.apps.localhost")


async def test_the_build_job_gets_the_model_and_the_programs(serving: Serving) -> None:
    created = await serving.send(CREATE)
    _, order = (await serving.emitted())[0]
    assert order["job_id"] == created.revision.build_job_id
    template = order["template"]
    assert template["kind"] == "build"
    assert template["inputs"] == [{"fileset_id": "fs1", "path": "model"}]
    assert template["command"][:3] == ["python", "-c", "build"]
    assert template["timeout_s"] == 600


async def test_a_name_is_unique_in_the_whole_installation_until_it_is_free(serving: Serving) -> None:
    created = await serving.send(CREATE)
    for sender in (MEMBER, STRANGER):
        with pytest.raises(Conflict, match="whole installation"):
            await serving.send(CREATE, sender)
    await serving.send(DeleteDeployment(deployment_id=created.id))
    await serving.job_is(JobCancelled, created.revision.build_job_id, "cancelled")
    await serving.look(2)
    again = await serving.send(CREATE, STRANGER)
    assert again.id != created.id


async def test_a_name_that_cannot_be_a_host_name_is_refused(serving: Serving) -> None:
    with pytest.raises(Invalid, match="host name"):
        await serving.send(CREATE.model_copy(update={"name": "My Digits"}))
    with pytest.raises(Invalid):
        await serving.send(CREATE.model_copy(update={"model_fileset_id": ""}))
    for wrong in (Resources(cpu_count=-1), Resources(gpu_count=0.5), Resources(memory_bytes=-1)):
        with pytest.raises(Invalid):
            await serving.send(CREATE.model_copy(update={"resources": wrong}))
    assert await serving.emitted() == []


async def test_members_see_the_token_viewers_do_not_and_strangers_see_nothing(serving: Serving) -> None:
    created = await serving.send(CREATE)
    seen = await serving.deployment()
    assert seen.endpoint_token.startswith("nble_")
    assert (await serving.deployment(created.id)).endpoint_token == seen.endpoint_token
    assert (await serving.deployment(sender=VIEWER)).endpoint_token == ""
    for name in ("digits", created.id, "other"):
        with pytest.raises(NotFound):
            await serving.send(GetDeployment(deployment_id=name), STRANGER)
        with pytest.raises(NotFound):
            await serving.send(DeleteDeployment(deployment_id=name), STRANGER)
    listed: DeploymentPage = await serving.send(ListDeployments(), VIEWER)
    assert [item.endpoint_token for item in listed.items] == [""]


async def test_the_token_is_in_no_event_no_kept_answer_and_not_readable_in_the_database(
    serving: Serving,
) -> None:
    first, _ = await deliver_twice(serving, CREATE, key="k1")
    token = (await serving.deployment()).endpoint_token
    assert token.encode() not in first.body
    assert all(token not in str(body) for _, body in await serving.emitted())
    async with serving.store.view() as view:
        row = await view.find_deployment("t1", "digits")
    assert row
    assert token.encode() not in row.token_sealed
    assert row.token_hash == secret_hash(token)


async def test_a_viewer_may_not_create_or_delete_and_an_attempt_may_do_nothing(serving: Serving) -> None:
    attempt = MEMBER.model_copy(update={"kind": "attempt", "role": ""})
    for message in (CREATE, DeleteDeployment(deployment_id="digits")):
        with pytest.raises(Forbidden):
            await serving.send(message, VIEWER)
    for message in (CREATE, GetDeployment(), ListDeployments(), DeleteDeployment()):
        with pytest.raises(Forbidden):
            await serving.send(message, attempt)


async def test_deleting_twice_is_deleting_once(serving: Serving) -> None:
    created = await serving.send(CREATE)
    first, second = await deliver_twice(serving, DeleteDeployment(deployment_id="digits"))
    assert Deployment.from_wire(first.body).state == "deleting"
    assert first.body == second.body
    assert (await serving.deployment(created.id)).desired_state == "deleted"


@pytest.mark.parametrize(
    ("event", "state"),
    [
        (JobQueued, "queued"),
        (JobStarting, "starting"),
        (JobRunning, "running"),
        (JobSucceeded, "succeeded"),
        (JobFailed, "failed"),
        (JobCancelled, "cancelled"),
        (JobTimedOut, "timed_out"),
    ],
)
async def test_a_jobs_event_is_noted_once_and_makes_its_deployment_due(
    serving: Serving, event: type[JobRunning], state: str
) -> None:
    created = await serving.send(CREATE)
    job = Job(id=created.revision.build_job_id, state=state, revision=2, detail="because", attempt=Attempt())
    await deliver_twice(serving, event(job=job))
    noted = await serving.ordered(job.id)
    assert (noted.state, noted.detail, noted.seen_revision) == (state, "because", 2)
    async with serving.store.view() as view:
        assert await view.due(serving.now[0], 10) == [created.id]


async def test_an_older_snapshot_changes_nothing(serving: Serving) -> None:
    created = await serving.send(CREATE)
    job_id = created.revision.build_job_id
    await serving.send(JobSucceeded(job=Job(id=job_id, state="succeeded", revision=9)))
    await serving.send(JobRunning(job=Job(id=job_id, state="running", revision=5)))
    assert (await serving.ordered(job_id)).state == "succeeded"


async def test_other_peoples_jobs_are_none_of_its_business(serving: Serving) -> None:
    await serving.send(JobRunning(job=Job(id="js-of-somebody", state="running", revision=1)))
    assert await serving.ordered("js-of-somebody") is None


async def test_pages_go_from_the_newest_back_and_end(serving: Serving) -> None:
    for number in range(5):
        await serving.send(CREATE.model_copy(update={"name": f"d{number}", "project_id": f"pr{number % 2}"}))
    names, cursor = [], ""
    while True:
        page: DeploymentPage = await serving.send(ListDeployments(limit=2, cursor=cursor))
        names += [item.name for item in page.items]
        cursor = page.next_cursor
        if not cursor:
            break
    assert names == ["d4", "d3", "d2", "d1", "d0"]
    of_one = await serving.send(ListDeployments(project_id="pr1"))
    assert [item.name for item in of_one.items] == ["d3", "d1"]


def test_a_sealed_token_opens_for_its_own_deployment_only(tmp_path: Path) -> None:
    vault = FileKeyVault(tmp_path / "keys" / "serving.key")
    sealed = vault.seal("nble_secret", "de1")
    assert FileKeyVault(tmp_path / "keys" / "serving.key").open(sealed, "de1") == "nble_secret"
    assert (tmp_path / "keys" / "serving.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(BrokenSeal):
        vault.open(sealed, "de2")
    with pytest.raises(BrokenSeal):
        vault.open(sealed[:-1] + bytes([sealed[-1] ^ 1]), "de1")
    with pytest.raises(BrokenSeal):
        FileKeyVault(tmp_path / "other.key").open(sealed, "de1")


MAKES_A_KEY = """
import resource, sys
from pathlib import Path
from services.serving.adapters.vault import key_from
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
key_from(Path(sys.argv[1]))
"""


def test_a_first_start_on_a_full_disk_leaves_no_half_key(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "serving.key"
    first = subprocess.run([sys.executable, "-c", MAKES_A_KEY, str(file)], capture_output=True, text=True, check=False)
    assert "File too large" in first.stderr
    vault = FileKeyVault(file)
    assert vault.open(vault.seal("nble_secret", "de1"), "de1") == "nble_secret"
    assert list(file.parent.iterdir()) == [file]
