"""Jobs find machines: the placer on real databases."""

from __future__ import annotations

import asyncio

import pytest

from libs.common import waiting
from libs.common.contracts.messages import ExecutionEnded, Principal, Resources, StopJob, SubmitJob
from libs.common.errors import StaleRevision
from services.scheduler.loops import placer
from tests.unit.scheduler.cases import PROJECT, said, template
from tests.unit.scheduler.world import World, node

pytestmark = pytest.mark.integration

OTHER = Principal(kind="user", id="u2", team_id="t" + "1" * 26, role="owner")


async def end(world: World, job_id: str, **facts) -> None:
    async with world.store.view() as view:
        case = await view.find(job_id)
    await world.deliver(
        ExecutionEnded(execution=said(case, "ended", 9, **({"reason": "exited", "exit_code": 0} | facts)))
    )


async def test_a_placement_is_one_commit_with_its_command_and_event(world):
    job_id = await world.running_job()
    job = await world.job(job_id)
    assert (job.state, job.attempt.number, job.attempt.node_id) == ("starting", 1, "node1")
    assert await world.names() == ["job.queued", "job.starting", "execution.start"]
    command = (await world.outbox())[-1][1]
    assert (command["attempt_id"], command["template"]["command"]) == (job.attempt.id, ["echo hello"])
    assert await world.place() == 0


async def test_a_job_that_cannot_be_placed_says_why(world):
    job_id = await world.submit(resources=Resources(cpu_count=1, gpu_count=2))
    await world.place()
    assert (await world.job(job_id)).detail == "no node is ready: no executor has reported its nodes yet"
    await world.report_nodes(detail="the Ray cluster is still starting")
    await world.place()
    await world.reconciler.reconcile()
    assert (await world.job(job_id)).detail == "no node is ready: the Ray cluster is still starting"
    await world.report_nodes(node())
    await world.place()
    await world.reconciler.reconcile()
    job = await world.job(job_id)
    assert (job.state, job.detail) == ("queued", "needs 2 GPUs, the largest node has 0 GPUs")
    await world.report_nodes(node(gpu_count=2))
    assert await world.place() == 1


async def test_a_reason_is_written_once(world):
    await world.submit()
    for _ in range(3):
        await world.place()
        await world.reconciler.reconcile()
    assert await world.names() == ["job.queued", "job.queued"]


async def test_freed_room_goes_to_who_waits(world):
    first = await world.running_job(resources=Resources(cpu_count=4))
    second = await world.submit(resources=Resources(cpu_count=4))
    assert await world.place() == 0
    await end(world, first)
    assert await world.place() == 1
    assert (await world.job(second)).state == "starting"


async def test_teams_share_a_full_cluster(world):
    mine = [await world.submit() for _ in range(4)]
    theirs = [await world.submit(OTHER) for _ in range(4)]
    await world.report_nodes(node())
    assert await world.place() == 4
    states = [[(await world.job(job_id)).state for job_id in ids].count("starting") for ids in (mine, theirs)]
    assert states == [2, 2]


async def test_the_picture_is_the_same_after_a_restart(world):
    running = await world.running_job(resources=Resources(cpu_count=3))
    waiting = [await world.submit(resources=Resources(cpu_count=2)) for _ in range(3)]
    await world.place()
    await world.restart()
    assert world.placer.policy.waiting == 3
    assert await world.place() == 0
    await end(world, running)
    assert await world.place() == 2
    assert [(await world.job(job_id)).state for job_id in waiting] == ["starting", "starting", "queued"]


async def test_a_job_stopped_between_decision_and_commit_is_not_started(world, monkeypatch):
    await world.report_nodes(node())
    job_id = await world.submit()
    decide = world.placer.policy.decide
    await world.placer._catch_up()
    await world.request(StopJob(job_id=job_id))
    world.store.changes.take()
    assert [placement.job_id for placement in decide(10**18)] == [job_id]
    decision = placer.Decision({job_id: ("node1",)}, {}, {})
    await world.store.run(lambda unit: placer._commit(unit, decision))
    assert "execution.start" not in await world.names()


async def test_a_commit_that_failed_is_decided_again(world, monkeypatch):
    await world.report_nodes(node())
    job_id = await world.submit()

    async def refuse(*_arguments):
        raise StaleRevision("jobs", job_id, 1)

    with monkeypatch.context() as broken:
        broken.setattr(placer, "_commit", refuse)
        with pytest.raises(StaleRevision):
            await world.place()
    assert await world.place() == 1
    assert (await world.names()).count("execution.start") == 1


async def test_a_silent_executor_gets_no_new_jobs(world):
    await world.report_nodes(node())
    await world.place()
    world.wait(31)
    job_id = await world.submit()
    assert await world.place() == 0
    assert (await world.job(job_id)).detail == "no node is ready: the executor is silent"
    await world.report_nodes(node())
    assert await world.place() == 1


async def test_an_older_inventory_does_not_replace_a_newer(world):
    await world.report_nodes(node())
    world.wait(-5)
    await world.report_nodes()
    await world.submit()
    assert await world.place() == 1


async def test_the_loop_places_as_soon_as_a_job_is_committed(world):
    await world.report_nodes(node())
    # It would not look by itself for ten minutes.
    loop = asyncio.create_task(placer.Placer(world.store, silent_s=1e6, pass_s=600, clock=lambda: world.now).run())
    await asyncio.sleep(0.05)
    job_id = await world.submit()
    async with asyncio.timeout(60):
        while (await world.job(job_id)).state != "starting":
            await asyncio.sleep(0.01)
    await waiting.end([loop], again_s=1.0)


async def test_many_submissions_and_ends_at_once_keep_every_promise(world):
    await world.report_nodes(node(cpu_count=10))
    ids = await asyncio.gather(*(world.submit(name=f"j{n}", max_retries=1) for n in range(40)))
    for turn in range(20):
        await world.place()
        world.wait(3)
        jobs = [await world.job(job_id) for job_id in ids]
        live = [job.id for job in jobs if job.state == "starting"]
        assert len(live) <= 10
        code = 1 if turn == 0 else 0
        await asyncio.gather(*(end(world, job_id, exit_code=code) for job_id in live))
        await world.report_nodes(node(cpu_count=10))
    details = [await world.detail(job_id) for job_id in ids]
    assert {detail.job.state for detail in details} == {"succeeded"}
    assert sorted(len(detail.attempts) for detail in details) == [1] * 30 + [2] * 10
    revisions: dict[str, list[int]] = {}
    for name, body in await world.outbox():
        if name.startswith("job."):
            revisions.setdefault(body["job"]["id"], []).append(int(body["job"]["revision"]))
    assert all(seen == list(range(1, len(seen) + 1)) for seen in revisions.values())


async def test_an_answer_lost_in_a_crash_is_given_again_after_the_restart(world):
    await world.report_nodes(node())
    message = SubmitJob(project_id=PROJECT, template=template())
    first = await world.request(message, key="k")
    await world.restart()
    await world.place()
    await world.restart()
    assert await world.request(message, key="k") == first
    assert await world.place() == 0
    assert await world.names() == ["job.queued", "job.starting", "execution.start"]
