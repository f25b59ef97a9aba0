"""Without a single event from the executor, jobs still come to what is true."""

from __future__ import annotations

import pytest

from libs.common.contracts.messages import (
    ExecutionRunning,
    NodePage,
    Principal,
    Project,
    ProjectArchived,
    ProjectCreated,
    StopJob,
)
from libs.common.errors import Conflict, Forbidden, NotFound, Unavailable
from libs.common.ids import new_id
from services.scheduler.loops.reconciler import PROJECTS
from services.scheduler.tables import JOBS
from tests.unit.scheduler.cases import PROJECT, TEAM, said
from tests.unit.scheduler.world import World, node

pytestmark = pytest.mark.integration

OTHER = Principal(kind="user", id="u2", team_id="t" + "1" * 26, role="owner")


async def knows(world: World, job_id: str, state: str, revision: int, **facts) -> None:
    """From now on the executor answers so about the job's newest attempt."""
    async with world.store.view() as view:
        case = await view.find(job_id)
    world.executor.known[case.attempt.id] = said(case, state, revision, **facts)


async def passes(world: World, seconds: float = 16) -> None:
    world.wait(seconds)
    world.executor.inventory = world.executor.inventory or NodePage(items=(node(),))
    await world.reconciler.reconcile()
    await world.place()


async def test_a_job_runs_to_its_end_with_events_switched_off(world):
    world.executor.inventory = NodePage(items=(node(),))
    job_id = await world.submit(max_retries=1)
    await passes(world)
    states = [(await world.job(job_id)).state]
    for state, revision, facts in (
        ("starting", 1, {}),
        ("running", 2, {}),
        ("ended", 3, {"reason": "exited", "exit_code": 1}),
        ("running", 1, {}),
        ("finishing", 2, {}),
        ("ended", 3, {"reason": "exited", "exit_code": 0}),
    ):
        await knows(world, job_id, state, revision, **facts)
        await passes(world)
        await passes(world)
        states.append((await world.job(job_id)).state)
    assert states == ["starting", "starting", "running", "starting", "running", "running", "succeeded"]
    assert (await world.job(job_id)).attempt.number == 2


async def test_a_start_command_that_was_lost_is_sent_again_for_the_same_attempt(world):
    await world.running_job()
    await passes(world)
    starts = [body["attempt_id"] for name, body in await world.outbox() if name == "execution.start"]
    assert len(starts) == 2
    assert len(set(starts)) == 1


async def test_a_start_command_is_not_sent_again_once_the_executor_knows_the_attempt(world):
    job_id = await world.running_job()
    await knows(world, job_id, "accepted", 1)
    for _ in range(3):
        await passes(world)
    assert (await world.names()).count("execution.start") == 1


async def test_a_stop_is_repeated_until_it_took(world):
    job_id = await world.running_job()
    await knows(world, job_id, "running", 1)
    await passes(world)
    await world.request(StopJob(job_id=job_id))
    await passes(world)
    await passes(world)
    assert (await world.names()).count("execution.stop") >= 3
    await knows(world, job_id, "ended", 2, reason="stopped")
    await passes(world)
    sent = (await world.names()).count("execution.stop")
    await passes(world)
    assert (await world.job(job_id)).state == "cancelled"
    assert (await world.names()).count("execution.stop") == sent


async def test_an_attempt_heard_of_lately_is_not_asked_about(world):
    job_id = await world.running_job()
    await passes(world, 10)
    assert world.executor.asked == []
    async with world.store.view() as view:
        case = await view.find(job_id)
    await world.deliver(ExecutionRunning(execution=said(case, "running")))
    await passes(world, 10)
    assert world.executor.asked == []
    await passes(world, 10)
    assert len(world.executor.asked) == 1


async def test_jobs_of_a_silent_executor_are_unreachable_and_never_run_again(world):
    job_id = await world.running_job()
    async with world.store.view() as view:
        case = await view.find(job_id)
    await world.deliver(ExecutionRunning(execution=said(case, "running")))
    world.executor.refusals[TEAM] = Unavailable("service_silent", "The executor service did not answer.")
    for _ in range(3):
        world.wait(31)
        await world.reconciler.reconcile()
        await world.place()
        job = await world.job(job_id)
        assert (job.state, job.detail, job.attempt.number) == ("unreachable", "the executor is silent", 1)
    await world.report_nodes(node())
    await world.reconciler.reconcile()
    assert (await world.job(job_id)).state == "running"
    assert (await world.names()).count("job.unreachable") == 1


async def test_jobs_of_a_node_out_of_contact_are_unreachable_alone(world):
    await world.report_nodes(node("node1", cpu_count=1), node("node2", cpu_count=1))
    ids = [await world.submit() for _ in range(2)]
    await world.place()
    await world.report_nodes(node("node1", state="silent"), node("node2"))
    await world.reconciler.reconcile()
    jobs = [await world.job(job_id) for job_id in ids]
    assert {job.attempt.node_id: job.state for job in jobs} == {
        "node1": "unreachable",
        "node2": "starting",
    }


async def test_our_own_absence_is_no_silence_of_the_executor(world):
    job_id = await world.running_job()
    await world.close()
    world.wait(3600)
    await world.restart()
    await world.reconciler.reconcile()
    assert (await world.job(job_id)).state == "starting"


async def test_impossible_news_harm_nobody_else(world):
    await world.report_nodes(node())
    first, second = [await world.submit() for _ in range(2)]
    await world.place()
    await knows(world, first, "finishing", 1)
    await knows(world, second, "running", 1)
    await passes(world)
    await knows(world, first, "running", 2)
    await knows(world, second, "ended", 2, reason="exited", exit_code=0)
    await passes(world)
    assert [(await world.job(job_id)).state for job_id in (first, second)] == ["running", "succeeded"]


async def test_a_project_whose_end_was_never_told_takes_no_new_jobs_once_the_registry_was_asked(world):
    project = Project(id=PROJECT, team_id=TEAM, state="active", revision=1)
    await world.deliver(ProjectCreated(project=project), source="registry")
    for state, revision in (("archived", 2), ("deleted", 3)):
        world.registry.projects[PROJECT] = project.model_copy(update={"state": state, "revision": revision})
        await passes(world, 61)
        with pytest.raises(Conflict, match=f"The project is {state}"):
            await world.submit()
    world.registry.projects[PROJECT] = project.model_copy(update={"revision": 4})
    await passes(world, 61)
    assert await world.submit()


async def test_a_project_never_heard_of_is_asked_about_after_its_first_job(world):
    world.registry.projects[PROJECT] = Project(id=PROJECT, team_id=TEAM, state="archived", revision=2)
    assert await world.submit()
    await passes(world)
    with pytest.raises(Conflict):
        await world.submit()


async def test_a_project_that_its_team_has_no_more_is_unknown_to_it_and_open_to_its_new_team(world):
    assert await world.submit()
    world.registry.projects[PROJECT] = Project(id=PROJECT, team_id=OTHER.team_id, state="active", revision=2)
    await passes(world)
    with pytest.raises(NotFound):
        await world.submit()
    assert await world.submit(OTHER)
    await passes(world)
    assert await world.submit(OTHER)
    with pytest.raises(NotFound):
        await world.submit()


async def test_a_registry_that_was_restored_is_believed_whatever_its_revisions(world):
    project = Project(id=PROJECT, team_id=TEAM, state="archived", revision=7)
    await world.deliver(ProjectArchived(project=project), source="registry")
    world.registry.projects[PROJECT] = project.model_copy(update={"state": "active", "revision": 6})
    await passes(world, 61)
    assert await world.submit()


async def test_projects_are_asked_about_a_few_at_a_time_and_no_answer_keeps_nobody_from_the_front(world):
    ids = [new_id("project") for _ in range(PROJECTS + 5)]
    for project_id in ids:
        project = Project(id=project_id, team_id=TEAM, state="active", revision=1)
        await world.deliver(ProjectCreated(project=project), source="registry")
    world.registry.refusals = [Forbidden("not_allowed", "Not you."), Unavailable("service_silent", "Nobody answers.")]
    await passes(world, 61)
    assert len(world.registry.asked) == 2
    await passes(world, 1)
    assert len(world.registry.asked) == PROJECTS + 2
    await passes(world, 1)
    assert sorted(world.registry.asked) == sorted(ids)


async def test_an_attempt_that_a_restored_executor_does_not_know_is_shown_and_never_run_again(world):
    job_id = await world.running_job(max_retries=3)
    await knows(world, job_id, "running", 5)
    await passes(world)
    known = world.executor.known.copy()
    world.executor.known.clear()
    for _ in range(3):
        await passes(world)
        job = await world.job(job_id)
        assert (job.state, job.attempt.number) == ("unreachable", 1)
        assert job.detail.startswith("the executor no longer knows its attempt")
    assert (await world.names()).count("execution.start") == 1
    assert (await world.names()).count("job.unreachable") == 1
    world.executor.known.update(known)
    await passes(world)
    assert (await world.job(job_id)).state == "running"


async def test_an_end_counts_although_a_restored_executor_counts_revisions_anew(world):
    job_id = await world.running_job()
    await knows(world, job_id, "running", 5)
    await passes(world)
    await knows(world, job_id, "ended", 4, reason="exited", exit_code=0)
    await passes(world)
    assert (await world.job(job_id)).state == "succeeded"


async def two_teams(world: World) -> tuple[str, str]:
    """A running job of each; the first team's attempt is asked about first."""
    await world.report_nodes(node())
    first = await world.submit()
    await world.place()
    world.wait(1)
    second = await world.submit(OTHER)
    await world.place()
    await knows(world, first, "running", 1)
    await knows(world, second, "running", 1)
    return first, second


async def test_a_refusal_for_one_team_keeps_no_other_from_being_asked_about(world):
    first, second = await two_teams(world)
    world.executor.refusals[TEAM] = Forbidden("not_allowed", "Not you.")
    await passes(world)
    assert [(await world.job(job_id)).state for job_id in (first, second)] == ["starting", "running"]
    world.executor.refusals.clear()
    await passes(world)
    assert (await world.job(first)).state == "running"


async def test_no_answer_for_one_team_puts_others_first_in_the_next_pass(world):
    _, second = await two_teams(world)
    world.executor.refusals[TEAM] = Unavailable("service_silent", "The executor service did not answer.")
    await passes(world)
    assert (await world.job(second)).state == "starting"
    await passes(world, 1)
    assert (await world.job(second)).state == "running"


async def test_contact_is_reviewed_in_the_order_of_the_last_look(world):
    await world.report_nodes(node())
    ids = [await world.submit() for _ in range(3)]
    await world.place()

    async def first_two() -> list[str]:
        async with world.store.view() as view:
            return [place.job_id for place in await view.places("starting", 2)]

    await world.store.run(lambda unit: unit.mark_checked(JOBS, ids[:2]))
    assert (await first_two())[0] == ids[2]
    world.wait(1)
    await world.reconciler.reconcile()
    world.wait(1)
    await world.store.run(lambda unit: unit.mark_checked(JOBS, ids[:1]))
    assert sorted(await first_two()) == sorted(ids[1:])


async def test_an_unreachable_job_says_what_its_cluster_says(world):
    await world.report_nodes(node())
    job_id = await world.submit()
    await world.place()
    for said_of_it in ("the Ray head at h:1 does not answer", "the Ray head at h:1 refuses us (wrong token?)"):
        await world.report_nodes(node(state="silent"), detail=said_of_it)
        for _ in range(2):
            await world.reconciler.reconcile()
        job = await world.job(job_id)
        assert (job.state, job.detail) == ("unreachable", f"its node is out of contact: {said_of_it}")
    await world.report_nodes(node(state="silent"), node("node2"))
    await world.reconciler.reconcile()
    assert (await world.job(job_id)).detail == "its node is out of contact"
    await world.report_nodes(node())
    await world.reconciler.reconcile()
    assert (await world.job(job_id)).state == "starting"
    assert (await world.names()).count("job.unreachable") == 3
