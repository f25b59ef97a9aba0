"""What a deployment needs next, from what is known of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from services.serving.domain.plan import (
    MAX_QUICK_DEATHS,
    CheckHealth,
    Clear,
    CollectBento,
    GiveUp,
    OrderedJob,
    OrderReplica,
    Restart,
    Situation,
    Wait,
    next_step,
)

pytestmark = pytest.mark.unit

NOW = datetime(2026, 1, 1, tzinfo=UTC)
JOB = OrderedJob("js1", "build", "ordered", "", "", NOW)
SITUATION = Situation("building", JOB, "", None, False, 0, NOW, ("js1",), NOW)
JOB_STATES = [
    "ordered",
    "queued",
    "starting",
    "running",
    "unreachable",
    "succeeded",
    "failed",
    "cancelled",
    "timed_out",
]


def at(state: str, job_state: str | None = None, **changes: object) -> Situation:
    job_changes = {key[4:]: changes.pop(key) for key in list(changes) if key.startswith("job_")}
    job = replace(JOB, state=job_state, **job_changes) if job_state else None  # type: ignore[arg-type]
    return replace(SITUATION, state=state, job=job, **changes)  # type: ignore[arg-type]


def seconds_ago(count: float) -> datetime:
    return NOW - timedelta(seconds=count)


@pytest.mark.parametrize("state", ["building", "starting", "ready", "failed", "deleting", "deleted"])
@pytest.mark.parametrize("job_state", [None, *JOB_STATES])
def test_there_is_a_step_for_every_state_with_every_state_of_its_job(state: str, job_state: str | None) -> None:
    assert next_step(at(state, job_state)) is not None


@pytest.mark.parametrize("job_state", ["failed", "cancelled", "timed_out"])
def test_a_build_that_did_not_succeed_fails_the_deployment_with_its_log(job_state: str) -> None:
    step = next_step(at("building", job_state, job_detail="exit code 1"))
    assert step == GiveUp("The model could not be built into a bento: exit code 1", log_of="js1")


def test_a_build_that_succeeded_has_its_bento_collected() -> None:
    assert isinstance(next_step(at("building", "succeeded")), CollectBento)


def test_a_build_that_never_ends_fails_even_if_the_scheduler_forgot_its_timeout() -> None:
    assert isinstance(next_step(at("building", "running", job_running_at=seconds_ago(700))), GiveUp)
    assert isinstance(next_step(at("building", "running", job_running_at=seconds_ago(500))), Wait)


def test_a_build_in_the_queue_is_waited_for_and_says_why() -> None:
    step = next_step(at("building", "queued", job_detail="no node is ready", job_ordered_at=seconds_ago(9000)))
    assert step == Wait("The build waits: no node is ready")


def test_the_first_replica_is_ordered_at_once_and_a_later_one_after_its_pause() -> None:
    assert next_step(at("starting")) == OrderReplica()
    assert next_step(at("starting", restart_at=NOW + timedelta(seconds=1))) == Wait()


def test_a_running_replica_is_asked_for_its_health_once_it_has_an_address() -> None:
    running = at("starting", "running", job_address="127.0.0.1:1", job_running_at=seconds_ago(1))
    assert isinstance(next_step(running), CheckHealth)
    assert isinstance(next_step(at("starting", "running", job_running_at=seconds_ago(1))), Wait)


def test_a_first_replica_that_never_answers_fails_and_a_later_one_is_replaced() -> None:
    silent = at("starting", "running", job_address="127.0.0.1:1", job_running_at=seconds_ago(121))
    assert isinstance(next_step(silent), GiveUp)
    assert isinstance(next_step(replace(silent, served_before=True)), Restart)


def test_pauses_between_quick_deaths_double_until_the_fifth_fails_the_deployment() -> None:
    pauses: list[float] = []
    deaths = 0
    while isinstance(step := next_step(at("starting", "failed", deaths=deaths)), Restart):
        deaths = step.deaths
        pauses.append(step.pause_s)
    assert pauses == [1, 2, 4, 8]
    assert isinstance(step, GiveUp)
    assert "started 5 times" in step.reason
    assert len(pauses) == MAX_QUICK_DEATHS - 1


def test_a_replica_that_served_for_long_is_no_quick_death() -> None:
    step = next_step(at("ready", "failed", ready_at=seconds_ago(3600), deaths=4, job_ended_at=NOW))
    assert isinstance(step, Restart)
    assert (step.deaths, step.pause_s) == (1, 1.0)


def test_a_replica_started_on_another_node_keeps_its_job() -> None:
    moved = at("ready", "running", target="127.0.0.1:1", job_address="127.0.0.1:2")
    requeued = at("ready", "queued", target="127.0.0.1:1")
    for situation in (moved, requeued):
        step = next_step(situation)
        assert isinstance(step, Restart)
        assert step.keep_job


@pytest.mark.parametrize("job_state", ["running", "unreachable"])
def test_a_ready_deployment_is_left_alone_while_its_replica_may_serve(job_state: str) -> None:
    step = next_step(at("ready", job_state, target="127.0.0.1:1", job_address="127.0.0.1:1"))
    assert step == Wait("")


def test_a_failed_deployment_gives_up_its_route_and_its_jobs() -> None:
    assert next_step(at("failed", live_jobs=("js1",))) == Clear()
    assert next_step(at("failed", live_jobs=(), target="127.0.0.1:1")) == Clear()
    assert next_step(at("failed", live_jobs=())) == Wait()
