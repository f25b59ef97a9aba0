"""Attempts of several processes: how each end of each rank of each type of gang moves the whole."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from libs.common.clock import from_us
from libs.common.contracts.gangs import rank_template, ranks_of
from libs.common.contracts.messages import Gang, Resources, Role, StartExecution, StopExecution
from libs.common.errors import Invalid
from services.scheduler.domain.lifecycles import ask_to_stop, follow_execution, missing_commands, place
from services.scheduler.domain.model import Case
from services.scheduler.domain.snapshots import attempt_message
from services.scheduler.domain.templates import checked_template
from tests.unit.scheduler.cases import NOW, queued, said, template

pytestmark = pytest.mark.unit

WELL = {"reason": "exited", "exit_code": 0}
BROKEN: dict[str, dict[str, Any]] = {
    "exit": {"reason": "exited", "exit_code": 3},
    "signal": {"reason": "exited", "exit_code": 139, "signal": 11},
    "out_of_memory": {"reason": "out_of_memory", "peak_memory_bytes": 5},
    "timed_out": {"reason": "timed_out"},
    "refused": {"reason": "refused", "detail": "no such environment"},
    "lost": {"reason": "lost"},
    "fenced": {"reason": "fenced"},
    "stopped": {"reason": "stopped"},
}
STOPPED = {"reason": "stopped", "detail": "asked"}
TYPES = {
    "torch": (Role(name="worker", count=3),),
    "grpc": (Role(name="master", count=1), Role(name="worker", count=1), Role(name="ps", count=1)),
    "mpi": (Role(name="master", count=1), Role(name="worker", count=2)),
    "ray": (Role(name="head", count=1), Role(name="worker", count=2)),
}
DECISIVE = {"torch": {0, 1, 2}, "grpc": {0, 1}, "mpi": {0}, "ray": {0}}


def gang(kind: str) -> Gang:
    return Gang(type=kind, roles=TYPES[kind])


def placed(kind: str = "torch", **fields: Any) -> Case:
    job = queued(gang=gang(kind), **fields).job
    return replace(place(job, "at1", [f"node{rank}" for rank in range(3)], NOW), commands=())


def tell(case: Case, rank: int, state: str, after_s: float = 0, **facts: Any) -> Case:
    """The case after one rank's news; commands are only those of this news."""
    assert case.attempt
    revision = case.attempt.members[rank].seen.revision + 1
    moment = {"ended_at": from_us(NOW) + timedelta(seconds=after_s)} if state == "ended" else {}
    news = said(case, state, max(revision, 1), rank=rank, **(moment | facts))
    return follow_execution(replace(case, commands=()), news, NOW)


def all_run(kind: str = "torch", **fields: Any) -> Case:
    case = placed(kind, **fields)
    for rank in range(3):
        case = tell(case, rank, "running")
    return case


def stops(case: Case) -> list[StopExecution]:
    return [command for command in case.commands if isinstance(command, StopExecution)]


def test_ranks_count_through_the_roles_in_their_order():
    roles = (Role(name="master", count=1), Role(name="worker", count=2), Role(name="ps", count=1))
    found = ranks_of(template(gang=Gang(type="grpc", roles=roles)))
    assert [(rank.number, rank.role, rank.index) for rank in found] == [
        (0, "master", 0),
        (1, "worker", 0),
        (2, "worker", 1),
        (3, "ps", 0),
    ]
    assert [rank.number for rank in ranks_of(template())] == [0]


def test_what_a_role_leaves_empty_is_as_in_the_template():
    role = Role(name="ps", count=1, command=("serve",), env={"A": "2"}, resources=Resources(memory_bytes=5))
    whole = template(
        command=("train",),
        env={"A": "1", "B": "1"},
        resources=Resources(cpu_count=2, gpu_count=1),
        ports=(80,),
        gang=Gang(type="grpc", roles=(Role(name="worker", count=1), role)),
    )
    worker, ps = (rank_template(whole, rank) for rank in ranks_of(whole))
    assert (worker.command, worker.env, worker.ports) == (("train",), {"A": "1", "B": "1"}, (80,))
    assert (ps.command, ps.env, ps.ports) == (("serve",), {"A": "2", "B": "1"}, ())
    assert (worker.resources, ps.resources) == (whole.resources, Resources(memory_bytes=5))


def test_a_gang_is_started_by_one_command_that_seats_every_rank():
    case = place(queued(gang=gang("torch")).job, "at1", ["a", "b", "a"], NOW)
    (start,) = case.commands
    assert isinstance(start, StartExecution)
    assert [(seat.rank, seat.node_id) for seat in start.seats] == [(0, "a"), (1, "b"), (2, "a")]
    assert start.node_id == "a"
    alone = place(queued().job, "at1", ["a"], NOW).commands[0]
    assert isinstance(alone, StartExecution)
    assert alone.seats == ()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_an_attempt_runs_when_its_last_rank_runs_and_ends_when_the_last_has_ended(order):
    case = placed()
    for step, (state, job, attempt) in enumerate(
        [("starting", "starting", "starting"), ("running", "running", "running"), ("finishing", "running", "finishing")]
    ):
        before = case.job.state
        for rank in order[:-1]:
            case = tell(case, rank, state)
            assert case.job.state == before if step else "starting"
        case = tell(case, order[-1], state)
        assert (case.job.state, case.attempt.state) == (job, attempt)
    for rank in order[:-1]:
        case = tell(case, rank, "ended", **WELL)
        assert case.job.state == "running"
        assert case.commands == ()
    case = tell(case, order[-1], "ended", **WELL)
    assert (case.job.state, case.attempt.state, case.job.exit_code) == ("succeeded", "succeeded", 0)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("end", BROKEN)
def test_a_rank_that_does_not_end_well_stops_the_others_once_and_is_the_reason(kind, rank, end):
    case = tell(all_run(kind), rank, "ended", **BROKEN[end])
    (stop,) = stops(case)
    assert stop.reason.startswith(f"rank {rank}")
    assert (case.job.state, case.attempt.decided_by) == ("running", rank)
    assert case.job.detail == stop.reason
    others = [other for other in range(3) if other != rank]
    for other in others:
        case = tell(case, other, "ended", after_s=1, **STOPPED)
        assert case.commands == ()
    alone = follow_execution(placed_alone(), said(placed_alone(), "ended", **BROKEN[end]), NOW)
    assert (case.attempt.state, case.job.state) == (alone.attempt.state, alone.job.state)
    assert case.attempt.detail == f"{title(kind, rank)}: {alone.attempt.detail}"
    assert case.attempt.exit_code == alone.attempt.exit_code


def placed_alone() -> Case:
    return replace(place(queued().job, "at1", ["node1"], NOW), commands=())


def title(kind: str, rank: int) -> str:
    role = ranks_of(template(gang=gang(kind)))[rank]
    return f"rank {rank}" if kind == "torch" else f"rank {rank} ({role.role} {role.index})"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "how", [STOPPED, BROKEN["signal"], BROKEN["lost"], WELL], ids=["stopped", "signal", "lost", "well"]
)
def test_who_only_serves_is_stopped_when_the_work_is_done_and_counts_as_fine(kind, how):
    case = all_run(kind)
    decisive = sorted(DECISIVE[kind])
    for rank in decisive:
        assert stops(case) == []
        case = tell(case, rank, "ended", **WELL)
    followers = [rank for rank in range(3) if rank not in DECISIVE[kind]]
    assert len(stops(case)) == bool(followers)
    for rank in followers:
        assert case.job.state == "running"
        case = tell(case, rank, "ended", after_s=1, **how)
    assert (case.job.state, case.job.exit_code, case.job.detail) == ("succeeded", 0, "")


@pytest.mark.parametrize("kind", ["grpc", "mpi", "ray"])
def test_a_server_that_ends_well_before_the_work_is_done_ends_nothing(kind):
    case = tell(all_run(kind), 2, "ended", **WELL)
    assert (case.commands, case.attempt.decided_by, case.job.state) == ((), None, "running")


def test_the_first_to_end_is_the_reason_although_another_was_heard_first():
    case = tell(all_run(), 0, "ended", after_s=2, **BROKEN["exit"])
    case = tell(case, 1, "ended", after_s=1, **BROKEN["signal"])
    case = tell(case, 2, "ended", after_s=0, **STOPPED)
    assert case.job.detail == "rank 1: ended by signal 11"


def test_a_gang_that_a_machine_took_down_is_preempted_and_not_failed():
    case = tell(all_run(), 2, "ended", **STOPPED)
    for rank in (0, 1):
        case = tell(case, rank, "ended", after_s=1, **STOPPED)
    assert (case.job.state, case.attempt.state, case.job.preemptions_used) == ("queued", "preempted", 1)


def test_a_lost_node_costs_the_gang_one_new_try_of_the_platforms():
    case = tell(all_run(), 1, "ended", **BROKEN["lost"])
    for rank in (0, 2):
        case = tell(case, rank, "ended", after_s=1, **STOPPED)
    assert (case.job.state, case.attempt.state, case.job.infra_retries_used) == ("queued", "lost", 1)


def test_a_failed_rank_costs_the_gang_one_try_of_the_users():
    case = tell(all_run(max_retries=1), 1, "ended", **BROKEN["exit"])
    assert case.job.state == "running"
    for rank in (0, 2):
        case = tell(case, rank, "ended", after_s=1, **STOPPED)
    assert (case.job.state, case.job.retries_used) == ("queued", 1)
    again = place(case.job, "at2", ["x", "y", "z"], NOW)
    assert (again.attempt.number, again.attempt.decided_by) == (2, None)
    assert tell(replace(again, attempt=replace(again.attempt, id="other")), 0, "running").job.state == "starting"


def test_a_rank_that_is_refused_stops_those_that_start():
    case = tell(placed(), 0, "starting", detail="pulls an image")
    assert case.job.detail == "pulls an image"
    case = tell(case, 2, "ended", **BROKEN["refused"])
    assert (len(stops(case)), case.job.state) == (1, "starting")


def test_the_stop_of_a_gang_that_is_ending_is_repeated_until_all_have_ended():
    case = tell(all_run(), 1, "ended", **BROKEN["exit"])
    assert [type(command) for command in missing_commands(case, known=True)] == [StopExecution]
    assert missing_commands(all_run(), known=True) == ()


def test_a_stopped_gang_is_cancelled_however_its_ranks_end():
    asked = ask_to_stop(all_run(), NOW)
    case = tell(asked, 1, "ended", **BROKEN["exit"])
    case = tell(case, 0, "ended", **WELL)
    case = tell(case, 2, "ended", **STOPPED)
    assert (case.job.state, case.job.detail) == ("cancelled", "stopped on request")


def test_news_of_a_rank_is_applied_once_and_never_after_its_end():
    case = tell(all_run(), 1, "ended", **BROKEN["exit"])
    for state, facts in (("running", {}), ("ended", WELL)):
        late = said(case, state, 99, rank=1, **facts)
        assert follow_execution(replace(case, commands=()), late, NOW) == replace(case, commands=())
    nobody = said(case, "running", 99, rank=7)
    assert follow_execution(case, nobody, NOW) == case


def test_people_see_each_rank():
    case = tell(all_run("grpc"), 2, "ended", **BROKEN["exit"])
    shown = attempt_message(case.job.template, case.attempt).members
    assert [(one.rank, one.role, one.node_id, one.state, one.exit_code) for one in shown] == [
        (0, "master", "node0", "running", None),
        (1, "worker", "node1", "running", None),
        (2, "ps", "node2", "ended", 3),
    ]
    alone = placed_alone()
    assert attempt_message(alone.job.template, alone.attempt).members == ()


@pytest.mark.parametrize("kind", TYPES)
def test_gangs_of_every_type_can_be_asked_for(kind):
    checked = checked_template(template(kind="", gang=gang(kind))).gang
    assert [(role.name, role.count) for role in checked.roles] == [(role.name, role.count) for role in TYPES[kind]]


def test_a_gang_whose_roles_say_what_to_run_needs_no_command_of_its_own():
    roles = (Role(name="worker", count=2, command=("train",)),)
    assert checked_template(template(kind="", command=(), gang=Gang(type="torch", roles=roles))).command == ("train",)


@pytest.mark.parametrize(
    ("wrong", "said_"),
    [
        (Gang(type="horovod", roles=TYPES["torch"]), "not a type of gang"),
        (Gang(type="torch"), "The roles of a gang of type torch are worker"),
        (Gang(type="torch", roles=(Role(name="ps", count=1),)), "The roles of a gang of type torch"),
        (Gang(type="grpc", roles=TYPES["grpc"][::-1]), "in this order"),
        (Gang(type="mpi", roles=(Role(name="worker", count=1),)), "has a master"),
        (Gang(type="torch", roles=(Role(name="worker", count=0),)), "has the count 0"),
        (Gang(type="torch", roles=(Role(name="worker", count=257),)), "256 at most"),
        (Gang(type="mpi", roles=(Role(name="master", count=2),)), "2 of the role master"),
        (Gang(type="torch", roles=(Role(name="worker", count=1, env={"1": ""}),)), "cannot be the name"),
        (Gang(type="torch", roles=(Role(name="worker", count=1, resources=Resources(cpu_count=-1)),)), "between 0"),
    ],
)
def test_a_gang_that_cannot_be_is_refused_with_the_reason(wrong, said_):
    with pytest.raises(Invalid, match=said_):
        checked_template(template(kind="", gang=wrong))
