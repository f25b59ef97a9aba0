from __future__ import annotations

import pytest

from libs.common.contracts.messages import (
    ExecutionEnded,
    ExecutionFinishing,
    ExecutionRunning,
    GetExperiment,
    GetJob,
    HaltJob,
    JobTemplate,
    ListExperiments,
    ListJobs,
    OrderJob,
    Principal,
    Project,
    ProjectArchived,
    ProjectCreated,
    ProjectDeleted,
    ProjectMoved,
    ProjectRestored,
    StartExperiment,
    StopJob,
    SubmitJob,
)
from libs.common.errors import Conflict, Forbidden, Invalid, NotFound
from libs.common.ids import new_id
from tests.unit.scheduler.cases import PROJECT, TEAM, said, template
from tests.unit.scheduler.world import USER, World, node

pytestmark = pytest.mark.unit

STRANGER = Principal(kind="user", id="u2", team_id="t" + "1" * 26, role="owner")


async def said_of(world: World, job_id: str, state: str, revision: int = 1, **fields):
    async with world.store.view() as view:
        case = await view.find(job_id)
    return said(case, state, revision, **fields)


async def test_a_submitted_job_is_queued_with_its_event_and_timeline(world):
    job = await world.request(SubmitJob(project_id=PROJECT, template=template(name="first")))
    detail = await world.query(GetJob(job_id=job["id"]))
    assert (job["state"], job["revision"], job["created_by"]) == ("queued", "1", "u1")
    assert [(entry.state, entry.detail) for entry in detail.timeline] == [("submitted", "by ada"), ("queued", "")]
    assert await world.names() == ["job.queued"]


async def test_submitting_twice_under_one_key_makes_one_job(world):
    message = SubmitJob(project_id=PROJECT, template=template())
    first, second = [await world.request(message, key="k") for _ in range(2)]
    assert first == second
    assert await world.names() == ["job.queued"]


async def test_a_refused_request_leaves_nothing_behind(world):
    with pytest.raises(Invalid):
        await world.request(SubmitJob(project_id=PROJECT, template=JobTemplate()))
    assert await world.names() == []


async def test_an_experiment_and_its_job_come_together(world):
    message = StartExperiment(project_id=PROJECT, name="digits", template=template())
    first, again = [await world.request(message, key="k") for _ in range(2)]
    assert first == again
    assert await world.names() == ["job.queued", "experiment.created"]
    found = await world.query(GetExperiment(experiment_id=first["id"]))
    assert (found.name, found.kind, len(found.jobs)) == ("digits", "single", 1)
    assert (await world.query(ListExperiments(project_id=PROJECT))).items == (found,)


async def test_a_job_joins_an_experiment_of_its_own_project_only(world):
    experiment = await world.request(StartExperiment(project_id=PROJECT, template=template()))
    message = SubmitJob(project_id=PROJECT, template=template(), experiment_id=experiment["id"])
    assert (await world.request(message))["experiment_id"] == experiment["id"]
    assert len((await world.query(GetExperiment(experiment_id=experiment["id"]))).jobs) == 2
    with pytest.raises(NotFound):
        await world.request(message.model_copy(update={"project_id": "pr" + "1" * 26}))
    with pytest.raises(NotFound):
        await world.request(message, STRANGER)


async def test_an_ordered_job_keeps_the_id_that_its_sender_chose(world):
    job_id = new_id("job")
    order = OrderJob(job_id=job_id, project_id=PROJECT, template=template(kind="replica", ports=(3000,)))
    await world.deliver(order, source="serving")
    await world.deliver(order, source="serving")
    assert (await world.job(job_id)).created_by == "serving"
    assert await world.names() == ["job.queued"]
    assert (await world.query(ListJobs())).items == ()
    assert len((await world.query(ListJobs(kind="any"))).items) == 1


async def test_halting_an_unknown_job_is_harmless_and_a_known_one_stops(world):
    await world.deliver(HaltJob(job_id=new_id("job")), source="serving")
    job_id = await world.submit()
    await world.deliver(HaltJob(job_id=job_id), team=STRANGER.team_id)
    assert (await world.job(job_id)).state == "queued"
    await world.deliver(HaltJob(job_id=job_id))
    assert (await world.job(job_id)).state == "cancelled"


async def test_a_queued_job_is_cancelled_at_once_and_never_placed(world):
    job_id = await world.submit()
    stopped = [await world.request(StopJob(job_id=job_id)) for _ in range(2)]
    await world.report_nodes(node())
    assert [job["state"] for job in stopped] == ["cancelled", "cancelled"]
    assert await world.place() == 0
    assert await world.names() == ["job.queued", "job.cancelled"]


async def test_a_running_job_is_told_to_stop_and_cancelled_when_it_has(world):
    job_id = await world.running_job()
    await world.deliver(ExecutionRunning(execution=await said_of(world, job_id, "running")))
    for _ in range(2):
        stopping = await world.request(StopJob(job_id=job_id))
    assert (stopping["state"], stopping["desired_state"]) == ("running", "cancelled")
    await world.deliver(ExecutionEnded(execution=await said_of(world, job_id, "ended", 2, reason="stopped")))
    job = await world.job(job_id)
    assert (job.state, job.attempt.state) == ("cancelled", "cancelled")
    assert (await world.names())[-3:] == ["job.running", "execution.stop", "job.cancelled"]


async def test_a_job_lives_from_placement_to_success(world):
    job_id = await world.running_job()
    for message, state, revision, facts in (
        (ExecutionRunning, "running", 1, {}),
        (ExecutionFinishing, "finishing", 2, {}),
        (ExecutionEnded, "ended", 3, {"reason": "exited", "exit_code": 0}),
    ):
        await world.deliver(message(execution=await said_of(world, job_id, state, revision, **facts)))
    detail = await world.detail(job_id)
    assert detail.job.state == "succeeded"
    assert [entry.state for entry in detail.timeline] == [
        "submitted", "queued", "starting", "running", "running", "succeeded"
    ]  # fmt: skip
    revisions = [int(body["job"]["revision"]) for name, body in await world.outbox() if name.startswith("job.")]
    assert revisions == [1, 2, 3, 4, 5]


async def test_a_failure_with_retries_left_starts_a_second_attempt(world):
    job_id = await world.running_job(max_retries=1)
    first = await said_of(world, job_id, "ended", reason="exited", exit_code=3)
    await world.deliver(ExecutionEnded(execution=first))
    assert await world.place() == 0
    world.wait(1)
    assert await world.place() == 1
    late = first.model_copy(update={"revision": 99, "exit_code": 0})
    await world.deliver(ExecutionEnded(execution=late))
    detail = await world.detail(job_id)
    assert (detail.job.state, detail.job.attempt.number) == ("starting", 2)
    assert [attempt.state for attempt in detail.attempts] == ["failed", "placed"]


async def test_a_report_on_an_unknown_job_is_dropped(world):
    job_id = await world.running_job()
    report = await said_of(world, job_id, "running")
    await world.deliver(ExecutionRunning(execution=report.model_copy(update={"job_id": new_id("job")})))
    assert (await world.job(job_id)).state == "starting"


@pytest.mark.parametrize(("event", "state"), [(ProjectArchived, "archived"), (ProjectDeleted, "deleted")])
async def test_a_closed_project_takes_no_new_jobs_until_it_is_restored(world, event, state):
    project = Project(id=PROJECT, team_id=TEAM, state=state, revision=2)
    await world.deliver(event(project=project), source="registry")
    old = project.model_copy(update={"state": "active", "revision": 1})
    await world.deliver(ProjectCreated(project=old), source="registry")
    with pytest.raises(Conflict) as refusal:
        await world.submit()
    assert refusal.value.code == f"project_{state}"
    assert "restore" in refusal.value.remedy
    restored = project.model_copy(update={"state": "active", "revision": 3})
    await world.deliver(ProjectRestored(project=restored), source="registry")
    assert await world.submit()


async def test_a_project_that_moved_is_unknown_to_its_old_team(world):
    project = Project(id=PROJECT, team_id=STRANGER.team_id, state="active", revision=2)
    await world.deliver(ProjectMoved(project=project, from_team_id=TEAM), source="registry")
    with pytest.raises(NotFound):
        await world.submit()
    assert await world.submit(STRANGER)


async def test_another_team_finds_nothing(world):
    job_id = await world.submit()
    experiment = await world.request(StartExperiment(project_id=PROJECT, template=template()))
    with pytest.raises(NotFound):
        await world.request(StopJob(job_id=job_id), STRANGER)
    for question in (GetJob(job_id=job_id), GetExperiment(experiment_id=experiment["id"])):
        with pytest.raises(NotFound):
            await world.query(question, STRANGER)
    assert (await world.query(ListJobs(), STRANGER)).items == ()
    assert (await world.query(ListExperiments(), STRANGER)).items == ()


async def test_an_attempt_sees_its_own_job_only(world):
    mine, other = await world.submit(), await world.submit()
    attempt = Principal(kind="attempt", id="at1", team_id=TEAM, project_id=PROJECT, job_id=mine)
    assert (await world.query(GetJob(job_id=mine), attempt)).job.id == mine
    with pytest.raises(NotFound):
        await world.query(GetJob(job_id=other), attempt)
    for message in (StopJob(job_id=mine), SubmitJob(project_id=PROJECT, template=template())):
        with pytest.raises(Forbidden):
            await world.request(message, attempt)


async def test_a_viewer_may_look_and_not_touch(world):
    viewer = USER.model_copy(update={"role": "viewer"})
    job_id = await world.submit()
    assert await world.query(GetJob(job_id=job_id), viewer)
    with pytest.raises(Forbidden):
        await world.request(StopJob(job_id=job_id), viewer)


async def test_lists_are_paged_newest_first_and_filtered(world):
    ids = [await world.submit(name=f"j{n}") for n in range(5)]
    await world.request(StopJob(job_id=ids[0]))
    first = await world.query(ListJobs(limit=2))
    second = await world.query(ListJobs(limit=3, cursor=first.next_cursor))
    assert [job.id for job in (*first.items, *second.items)] == ids[::-1]
    assert second.next_cursor == ""
    assert [job.id for job in (await world.query(ListJobs(state="cancelled"))).items] == ids[:1]
    with pytest.raises(Invalid):
        await world.query(ListJobs(state="stuck"))


async def test_a_page_of_large_jobs_stays_small(world):
    for _ in range(9):
        await world.submit(command=("x" * 100_000,))
    page = await world.query(ListJobs())
    assert 1 <= len(page.items) < 9
    assert page.next_cursor
    assert len(page.to_wire()) < 1_000_000


async def test_an_unknown_project_is_taken_and_a_malformed_one_is_not(world):
    with pytest.raises(Invalid):
        await world.request(SubmitJob(project_id="my-project", template=template()))
    assert await world.submit()
