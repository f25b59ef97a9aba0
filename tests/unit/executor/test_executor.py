"""Handlers and loops on a real database, each message delivered twice, with a cluster in memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import sqlmodel

from libs.common.clock import to_us, utc_now
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    AuthenticateAttempt,
    Container,
    Execution,
    JobTemplate,
    ListExecutions,
    ListNodes,
    LogSealed,
    Principal,
    ReportExecution,
    Resources,
    StartExecution,
    StopExecution,
)
from libs.common.errors import Conflict, Forbidden, Unauthenticated, Unavailable
from libs.common.ids import secret_hash
from services.executor import handlers
from services.executor.loops import Driver, Watcher
from services.executor.ports import Reservation
from services.executor.settings import ExecutorSettings
from services.executor.store import TokenRow
from tests.unit.executor.bench import SERVICE, TEAM, Bench, start
from tests.unit.executor.fake_cluster import NODE, FakeCluster

pytestmark = pytest.mark.unit


def report(asked: StartExecution, state: str, **facts: Any) -> ReportExecution:
    return ReportExecution(execution=Execution(attempt_id=asked.attempt_id, node_id=NODE, state=state, **facts))


async def test_an_accepted_execution_is_reserved_and_started_once(bench: Bench) -> None:
    asked = start(template=JobTemplate(command=("x",), resources=Resources(gpu_count=1)))
    await bench.deliver(asked)
    assert (await bench.row(asked.attempt_id)).state == "accepted"
    await bench.work()
    row = await bench.row(asked.attempt_id)
    assert (row.state, row.gpu_indices) == ("starting", [0])
    assert [order.attempt_id for order in bench.cluster.orders] == [asked.attempt_id]
    assert bench.cluster.orders[0].team_uid == 61001


async def test_an_attempt_id_of_another_job_is_refused(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    with pytest.raises(Conflict, match="number 1"):
        await bench.deliver(start(attempt_id=asked.attempt_id))


async def test_teams_have_numbers_of_their_own(bench: Bench) -> None:
    async with bench.store.begin() as unit:
        numbers = [await unit.team_number(team) for team in ("a", "b", "a", "c")]
    assert numbers == [1, 2, 1, 3]


async def test_reports_move_the_execution_and_are_told_on(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    now = utc_now()
    await bench.deliver(report(asked, "running", started_at=now, isolation="bwrap", addresses={"3000": "h:1"}))
    await bench.deliver(report(asked, "finishing"))
    await bench.deliver(report(asked, "ended", reason="exited", exit_code=3, ended_at=now, peak_memory_bytes=9))
    assert await bench.names() == ["execution.running", "execution.finishing", "execution.ended"]
    last = (await bench.emitted())[-1][1].execution  # type: ignore[attr-defined]
    assert (last.state, last.reason, last.exit_code, last.peak_memory_bytes) == ("ended", "exited", 3, 9)
    assert (last.addresses, last.isolation, last.team_id) == ({"3000": "h:1"}, "bwrap", TEAM)
    revisions = [event.execution.revision for name, event in await bench.emitted() if name != "node.reported"]  # type: ignore[attr-defined]
    assert revisions == sorted(set(revisions))


async def test_reports_that_overtake_each_other_end_in_the_same_state(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    for state in ("ended", "running", "finishing"):
        await bench.deliver(report(asked, state, reason="exited", exit_code=0))
    assert (await bench.row(asked.attempt_id)).state == "ended"
    assert await bench.names() == ["execution.ended"]


async def test_a_report_of_an_unknown_attempt_changes_nothing(bench: Bench) -> None:
    await bench.deliver(report(start(), "running"))
    assert await bench.names() == []


async def test_an_ended_execution_gives_its_resources_back(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    assert asked.attempt_id in bench.cluster.held
    await bench.deliver(report(asked, "ended", reason="exited", exit_code=0))
    await bench.work()
    assert bench.cluster.held == {}


async def test_the_folder_goes_when_the_log_is_sealed_and_not_before(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    bench.cluster.report(NODE, asked.attempt_id, state="ended", reason="exited")
    await bench.deliver(report(asked, "ended", reason="exited", exit_code=0))
    await bench.work()
    assert (NODE, asked.attempt_id) in bench.cluster.attempts
    await bench.deliver(LogSealed(job_id=asked.job_id))
    await bench.work()
    assert bench.cluster.attempts == {}


async def ended(bench: Bench) -> StartExecution:
    """One whose process has ended, and whose folder is on its node."""
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    bench.cluster.report(NODE, asked.attempt_id, state="ended", reason="exited")
    await bench.deliver(report(asked, "ended", reason="exited", exit_code=0))
    await bench.work()
    return asked


async def test_a_seal_that_was_never_told_is_asked_for(bench: Bench) -> None:
    asked = await ended(bench)
    await bench.sweeper.ask_for_seals()
    await bench.work()
    assert (NODE, asked.attempt_id) in bench.cluster.attempts
    bench.logs.sealed.add(asked.job_id)
    await bench.sweeper.ask_for_seals()
    await bench.work()
    assert bench.cluster.attempts == {}
    await bench.sweeper.ask_for_seals()
    assert bench.logs.asked == [asked.job_id] * 2


async def test_storage_is_asked_first_for_what_was_asked_longest_ago(bench: Bench) -> None:
    jobs = [(await ended(bench)).job_id for _ in range(3)]
    bench.logs.refusals = [Forbidden("not_allowed", "Not you."), Unavailable("service_silent", "Nobody answers.")]
    await bench.sweeper.ask_for_seals()
    assert bench.logs.asked == jobs[:2]
    await bench.sweeper.ask_for_seals()
    assert bench.logs.asked == [*jobs[:2], jobs[2], *jobs[:2]]


async def test_the_folder_goes_of_an_attempt_that_ended_before_its_start_was_noted(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    async with bench.store.begin() as unit:
        row = await unit.execution(asked.attempt_id)
        assert row
        await handlers.advance(unit, row, "reserve")
    bench.cluster.report(NODE, asked.attempt_id, state="ended", reason="exited")
    await bench.deliver(report(asked, "ended", reason="exited", exit_code=0))
    await bench.deliver(LogSealed(job_id=asked.job_id))
    await bench.work()
    assert bench.cluster.attempts == {}


async def test_what_a_stop_left_on_the_node_for_a_start_that_never_came_goes_too(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    async with bench.store.begin() as unit:
        row = await unit.execution(asked.attempt_id)
        assert row
        await handlers.advance(unit, row, "reserve")
    await bench.deliver(StopExecution(attempt_id=asked.attempt_id, reason="cancelled"))
    await bench.work()
    assert bench.cluster.barred == {asked.attempt_id}
    await bench.deliver(LogSealed(job_id=asked.job_id))
    await bench.work()
    assert bench.cluster.barred == set()


@pytest.mark.parametrize("back_as", [NODE, "node2"])
async def test_a_folder_whose_node_was_away_goes_when_its_agent_lists_it_again(bench: Bench, back_as: str) -> None:
    asked = await ended(bench)
    bench.cluster.alive.clear()
    bench.now_s += 100
    await bench.watcher.look()
    await bench.deliver(LogSealed(job_id=asked.job_id))
    await bench.work()
    folder = bench.cluster.attempts.pop((NODE, asked.attempt_id))
    bench.cluster.alive = {back_as}
    bench.cluster.attempts[back_as, asked.attempt_id] = folder
    await bench.watcher.look()
    await bench.work()
    assert bench.cluster.attempts == {}


async def test_an_execution_stopped_before_it_is_reserved_never_starts(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.deliver(StopExecution(attempt_id=asked.attempt_id, reason="cancelled"))
    await bench.work()
    row = await bench.row(asked.attempt_id)
    assert (row.state, row.reason, row.detail) == ("ended", "stopped", "cancelled")
    assert bench.cluster.orders == []


async def test_a_stop_is_repeated_until_it_took(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    bench.cluster.deaf.add(NODE)
    await bench.deliver(StopExecution(attempt_id=asked.attempt_id, reason="cancelled"))
    await bench.work()
    assert (await bench.row(asked.attempt_id)).state == "starting"
    bench.cluster.deaf.clear()
    await bench.work()
    await bench.watcher.look()
    row = await bench.row(asked.attempt_id)
    assert (row.state, row.reason) == ("ended", "stopped")


async def test_a_stop_of_an_unknown_attempt_leaves_nothing(bench: Bench) -> None:
    await bench.deliver(StopExecution(attempt_id="at0none", reason="cancelled"))
    await bench.work()
    assert bench.cluster.stops == []


async def test_a_full_node_is_waited_for_and_given_up_in_the_end(bench: Bench) -> None:
    first, second = (start(template=JobTemplate(command=("x",), resources=Resources(cpu_count=3))) for _ in "ab")
    for asked in (first, second):
        await bench.deliver(asked)
        await bench.work()
    waiting = await bench.row(second.attempt_id)
    assert (waiting.state, waiting.detail, waiting.revision) == ("accepted", "the node is full", 2)
    hasty = ExecutorSettings(home=bench.settings.home, reserve_patience_s=0.0)
    await _drive(Driver(bench.store, bench.cluster, hasty))
    row = await bench.row(second.attempt_id)
    assert (row.state, row.reason, row.detail) == ("ended", "lost", "it never started: the node is full")
    await bench.work()
    assert second.attempt_id not in await bench.cluster.reserved()


async def test_an_attempt_leaves_an_absent_node_once_the_inventory_says_so(bench: Bench) -> None:
    driver = Driver(bench.store, bench.cluster, ExecutorSettings(home=bench.settings.home, look_s=0.0))
    asked = start()
    await bench.watcher.look()
    bench.cluster.alive.clear()
    await bench.deliver(asked)
    await _drive(driver)
    assert (await bench.row(asked.attempt_id)).state == "accepted", "the scheduler would choose the same node again"
    await bench.watcher.look()
    await _drive(driver)
    row = await bench.row(asked.attempt_id)
    assert (row.state, row.reason) == ("ended", "lost")
    assert row.detail == f"it never started: the node {NODE} is not among the living ones"


async def test_a_reservation_that_came_late_leaves_no_reason_behind(bench: Bench) -> None:
    first, second = (start(template=JobTemplate(command=("x",), resources=Resources(cpu_count=3))) for _ in "ab")
    for asked in (first, second):
        await bench.deliver(asked)
        await bench.work()
    await bench.deliver(report(first, "ended", reason="exited", exit_code=0))
    await bench.work()
    row = await bench.row(second.attempt_id)
    assert (row.state, row.detail) == ("starting", "")


async def _drive(driver: Driver) -> None:
    await driver.look_for_work()
    await driver.settle()


async def test_a_node_that_is_no_more_loses_what_never_started_at_once(bench: Bench) -> None:
    asked = start(node_id="elsewhere")
    await bench.deliver(asked)
    await bench.work()
    row = await bench.row(asked.attempt_id)
    assert (row.state, row.reason) == ("ended", "lost")


async def test_an_executor_that_died_after_reserving_goes_on_and_both_tokens_count(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    async with bench.store.begin() as unit:
        row = await unit.execution(asked.attempt_id)
        assert row
        await unit.keep_token(secret_hash("nbla_first"), row.id)
        await handlers.advance(unit, row, "reserve")
    await bench.work()
    (told,) = bench.cluster.orders
    for token in ("nbla_first", told.token):
        assert (await _authenticate(bench, token)).attempt_id == asked.attempt_id


async def _authenticate(bench: Bench, token: str) -> Execution:
    call = Envelope(id="e", type="t", source="gateway", time=utc_now(), sender=SERVICE)
    async with bench.store.view() as view:
        return await handlers.authenticate_attempt(AuthenticateAttempt(token_hash=secret_hash(token)), view, call)


async def test_a_token_dies_with_its_attempt(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    token = bench.cluster.orders[0].token
    assert (await _authenticate(bench, token)).job_id == asked.job_id
    await bench.deliver(report(asked, "ended", reason="exited", exit_code=0))
    with pytest.raises(Unauthenticated):
        await _authenticate(bench, token)
    with pytest.raises(Unauthenticated):
        await _authenticate(bench, "nbla_guess")
    async with bench.store.view() as view:
        assert (await view.session.exec(sqlmodel.select(TokenRow))).all() == []


async def test_what_ended_over_a_year_ago_is_forgotten(bench: Bench) -> None:
    old, newer, runs = [await ended(bench) for _ in range(2)] + [start()]
    await bench.deliver(runs)
    for asked, days in ((old, 366), (newer, 364)):
        async with bench.store.begin() as unit:
            row = await unit.execution(asked.attempt_id)
            assert row
            await unit.change(row, ended_us=to_us(utc_now() - timedelta(days=days)))
    await bench.sweeper.forget_old()
    async with bench.store.view() as view:
        left = await view.executions([each.attempt_id for each in (old, newer, runs)])
    assert {row.id for row in left} == {newer.attempt_id, runs.attempt_id}


async def test_executions_of_other_teams_are_not_listed(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    question = ListExecutions(attempt_ids=(asked.attempt_id, "at0none"))
    for team, count in ((TEAM, 1), ("t0other", 0)):
        sender = Principal(kind="service", id="scheduler", team_id=team)
        call = Envelope(id="e", type="t", source="scheduler", time=utc_now(), sender=sender)
        async with bench.store.view() as view:
            assert len((await handlers.list_executions(question, view, call)).items) == count


async def test_the_inventory_says_why_there_is_no_node(bench: Bench) -> None:
    call = Envelope(id="e", type="t", source="gateway", time=utc_now(), sender=SERVICE)

    async def page() -> Any:
        async with bench.store.view() as view:
            return await handlers.list_nodes(ListNodes(), view, call)

    assert [node.state for node in (await page()).items] == ["ready"]
    bench.cluster.away = "the Ray cluster is still starting"
    await bench.watcher.look()
    assert [node.state for node in (await page()).items] == ["silent"]
    assert (await page()).detail == "the Ray cluster is still starting"


async def test_the_inventory_is_sent_when_it_changes_and_every_five_seconds(bench: Bench) -> None:
    async def sent() -> int:
        return sum(name == "node.reported" for name, _ in await bench.emitted())

    assert await sent() == 1
    await bench.watcher.look()
    assert await sent() == 1
    bench.now_s += 5
    await bench.watcher.look()
    assert await sent() == 2
    bench.cluster.deaf.add(NODE)
    await bench.watcher.look()
    assert await sent() == 3


async def test_what_reports_did_not_bring_is_learnt_by_looking(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    bench.cluster.report(NODE, asked.attempt_id, state="ended", reason="exited", exit_code=0)
    await bench.watcher.look()
    assert (await bench.row(asked.attempt_id)).state == "ended"


async def test_a_run_is_lost_only_after_its_nodes_fence_and_margin(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    bench.cluster.alive.clear()
    bench.now_s += 39.9
    await bench.watcher.look()
    assert (await bench.row(asked.attempt_id)).state == "starting"
    bench.now_s += 0.1
    await bench.watcher.look()
    row = await bench.row(asked.attempt_id)
    assert (row.state, row.reason) == ("ended", "lost")


async def test_a_restarted_executor_counts_silence_from_its_start(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    bench.cluster.alive.clear()
    await bench.watcher.look()
    again = Watcher(bench.store, bench.cluster, bench.settings, bench.driver.wake, lambda: bench.now_s + 1000)
    await again.recall()
    await again.look()
    assert (await bench.row(asked.attempt_id)).state == "starting"


async def test_a_head_that_does_not_answer_us_may_still_hear_its_nodes(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    bench.cluster.away = "the Ray head does not answer"
    for _ in range(3):
        bench.now_s += 39.9
        await bench.watcher.look()
        assert (await bench.row(asked.attempt_id)).state == "starting"
    bench.cluster.away = ""
    bench.cluster.alive.clear()
    bench.now_s += 39.9
    await bench.watcher.look()
    assert (await bench.row(asked.attempt_id)).state == "starting"
    bench.now_s += 0.1
    await bench.watcher.look()
    assert (await bench.row(asked.attempt_id)).reason == "lost"


async def test_a_stray_whose_agent_is_deaf_is_stopped_when_it_hears_and_holds_up_nobody(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    bench.cluster.alive.clear()
    bench.now_s += 100
    await bench.watcher.look()
    bench.cluster.alive.add(NODE)
    bench.cluster.mute.add(NODE)
    assert await bench.watcher.look()
    assert bench.cluster.stops == []
    bench.cluster.mute.clear()
    await bench.watcher.look()
    assert bench.cluster.stops == [(asked.attempt_id, "the attempt was given up")]


async def test_impossible_news_of_one_attempt_harm_no_other(bench: Bench) -> None:
    unreserved, fine = start(), start()
    await bench.deliver(fine)
    await bench.work()
    await bench.deliver(unreserved)
    bench.cluster.report(NODE, unreserved.attempt_id, state="running")
    bench.cluster.report(NODE, fine.attempt_id, state="running")
    assert await bench.watcher.look()
    assert (await bench.row(unreserved.attempt_id)).state == "accepted"
    assert (await bench.row(fine.attempt_id)).state == "running"


async def test_a_lost_run_that_comes_back_is_stopped(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    bench.cluster.alive.clear()
    bench.now_s += 100
    await bench.watcher.look()
    bench.cluster.alive.add(NODE)
    await bench.watcher.look()
    assert bench.cluster.stops == [(asked.attempt_id, "the attempt was given up")]
    assert (await bench.row(asked.attempt_id)).reason == "lost"


async def test_an_attempt_found_under_a_new_node_id_moves_there(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    await bench.deliver(report(asked, "running"))
    bench.cluster.alive = {"node2"}
    bench.cluster.attempts.clear()
    bench.cluster.report("node2", asked.attempt_id, state="running")
    await bench.watcher.look()
    assert (await bench.row(asked.attempt_id)).node_id == "node2"
    bench.now_s += 100
    await bench.watcher.look()
    assert (await bench.row(asked.attempt_id)).state == "running"


async def test_the_sweeper_mends_reservations_in_both_directions(bench: Bench) -> None:
    over, going = start(), start()
    for asked in (over, going):
        await bench.deliver(asked)
        await bench.work()
    kept = bench.cluster.held[over.attempt_id]
    await bench.deliver(report(over, "ended", reason="exited", exit_code=0))
    await bench.work()
    bench.cluster.held = {over.attempt_id: kept}
    await bench.sweeper.sweep()
    assert set(bench.cluster.held) == {going.attempt_id}


def gpu_job() -> StartExecution:
    return start(template=JobTemplate(command=("x",), resources=Resources(gpu_count=1)))


async def test_a_head_that_lost_count_of_gpus_puts_nobody_beside_a_job_that_runs(bench: Bench) -> None:
    first, second, third, fourth = (gpu_job() for _ in range(4))
    for asked in (first, second):
        await bench.deliver(asked)
        await bench.work()
    assert (await bench.row(second.attempt_id)).gpu_indices == [1]
    await bench.deliver(report(first, "ended", reason="exited", exit_code=0))
    await bench.watcher.look()
    await bench.work()
    # The head is lost with all reservations, and has the survivor's again: on the first GPU.
    bench.cluster.held.clear()
    await bench.sweeper.sweep()
    assert bench.cluster.gpus[second.attempt_id] == ((0,),)
    await bench.deliver(third)
    await bench.work()
    assert bench.cluster.gpus[third.attempt_id] == ((1,),)
    assert (await bench.row(third.attempt_id)).gpu_indices == [0], "where really nobody is"
    assert bench.cluster.orders[-1].gpu_indices == (0,)
    # It is lost again, and a job comes before what runs has its reservation back.
    bench.cluster.held.clear()
    await bench.deliver(fourth)
    await bench.work()
    row = await bench.row(fourth.attempt_id)
    assert (row.state, row.gpu_indices) == ("accepted", [])
    assert row.detail == "GPUs that Ray counts as free are used by what runs since before its head was lost"


async def test_a_start_waits_while_there_is_no_cluster(bench: Bench) -> None:
    bench.cluster.away = "the Ray cluster is still starting"
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    assert (await bench.row(asked.attempt_id)).state == "accepted"
    bench.cluster.away = ""
    await bench.work()
    assert (await bench.row(asked.attempt_id)).state == "starting"


async def test_without_walls_a_job_is_refused_where_others_could_come_in(bench: Bench) -> None:
    bench.cluster.isolation = "process"
    await bench.watcher.look()
    fine, refused = start(), start()
    await bench.deliver(fine)
    await bench.work()
    assert (await bench.row(fine.attempt_id)).state == "starting"
    bench.driver = Driver(bench.store, bench.cluster, bench.settings.model_copy(update={"host": "0.0.0.0"}))
    await bench.deliver(refused)
    await bench.work()
    row = await bench.row(refused.attempt_id)
    assert (row.state, row.reason) == ("ended", "refused")
    assert "listens on 0.0.0.0" in row.detail


@pytest.mark.parametrize(("runtimes", "state"), [(("podman",), "starting"), (("bwrap",), "ended")])
async def test_only_an_engines_containers_have_walls_where_the_node_has_none(
    bench: Bench, runtimes: tuple[str, ...], state: str
) -> None:
    bench.cluster.isolation, bench.cluster.runtimes = "process", runtimes
    await bench.watcher.look()
    first, second = start(), start()
    await bench.deliver(first)
    await bench.work()
    in_image = second.template.model_copy(update={"container": Container(image="python:3.12")})
    second = second.model_copy(update={"template": in_image})
    await bench.deliver(second, team_id="another")
    await bench.work()
    row = await bench.row(second.attempt_id)
    assert row.state == state, row.detail
    assert state != "ended" or "only the first team" in row.detail


@dataclass
class SlowCluster(FakeCluster):
    """Reserves GPUs only when it is told to, as cold workers do."""

    warm: asyncio.Event = field(default_factory=asyncio.Event)

    async def reserve(self, wanted: Reservation) -> tuple[tuple[int, ...], ...]:
        if any(part.gpu_count for part in wanted.parts):
            await self.warm.wait()
        return await super().reserve(wanted)


async def test_a_stop_does_not_wait_behind_reservations(bench: Bench) -> None:
    cluster = SlowCluster()
    driver = Driver(bench.store, cluster, bench.settings)
    runs = start()
    await bench.deliver(runs)
    await driver.look_for_work()
    await driver.settle()
    for _ in range(40):
        await bench.deliver(start(template=JobTemplate(command=("true",), resources=Resources(gpu_count=1))))
    await driver.look_for_work()
    await bench.deliver(StopExecution(attempt_id=runs.attempt_id, reason="cancelled"))
    await driver.look_for_work()
    async with asyncio.timeout(30):
        while not cluster.stops:
            await asyncio.sleep(0.01)
    cluster.warm.set()
    await driver.settle()
