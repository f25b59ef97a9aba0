from __future__ import annotations

from dataclasses import replace

import pytest

from libs.common.contracts.messages import Environment, Execution, Retry, Source, StartExecution, StopExecution
from libs.common.errors import IllegalTransition
from services.scheduler.domain import shapes
from services.scheduler.domain.lifecycles import (
    ATTEMPTS,
    JOBS,
    MAX_INFRA_RETRIES,
    MAX_PREEMPTIONS,
    ask_to_stop,
    follow_execution,
    give_up,
    lose_contact,
    missing_commands,
    place,
    regain_contact,
    retry_delay_s,
)
from services.scheduler.domain.model import Case
from tests.unit.scheduler.cases import NOW, SECOND, placed, queued, said

pytestmark = pytest.mark.unit

ENDED = {"succeeded", "failed", "cancelled", "timed_out"}
LIVE = {"starting", "running", "unreachable"}
JOB_TRIGGERS = {
    "hold": {"submitted": "waiting"},
    "admit": {"submitted": "queued", "waiting": "queued"},
    "place": {"queued": "starting"},
    "give_up": {"queued": "failed"},
    "run": {"starting": "running", "unreachable": "running"},
    "lose_contact": {"starting": "unreachable", "running": "unreachable"},
    "resume": {"unreachable": "starting"},
    "requeue": dict.fromkeys(LIVE, "queued"),
    "succeed": dict.fromkeys(LIVE, "succeeded"),
    "fail": dict.fromkeys(LIVE, "failed"),
    "time_out": dict.fromkeys(LIVE, "timed_out"),
    "cancel": dict.fromkeys({"submitted", "waiting", "queued"} | LIVE, "cancelled"),
}
OPEN = {"placed", "starting", "running", "finishing"}
ATTEMPT_TRIGGERS = {
    "place": {"created": "placed"},
    "accept": {"placed": "starting"},
    "run": {"placed": "running", "starting": "running"},
    "finish": {"placed": "finishing", "starting": "finishing", "running": "finishing"},
    "succeed": dict.fromkeys(OPEN, "succeeded"),
    "fail": dict.fromkeys(OPEN, "failed"),
    "cancel": dict.fromkeys(OPEN, "cancelled"),
    "time_out": dict.fromkeys(OPEN, "timed_out"),
    "preempt": dict.fromkeys(OPEN, "preempted"),
    "lose": dict.fromkeys(OPEN, "lost"),
}
MACHINES = [(JOBS, JOB_TRIGGERS), (ATTEMPTS, ATTEMPT_TRIGGERS)]
PRODUCT = [
    pytest.param(table, moves, state, id=f"{table.aggregate}-{state}-{trigger}")
    for table, triggers in MACHINES
    for state in sorted(table.states)
    for trigger, moves in ((trigger, (trigger, triggers[trigger])) for trigger in triggers)
]


@pytest.mark.parametrize(("table", "moves", "state"), PRODUCT)
def test_every_state_meets_every_trigger_as_the_table_says(table, moves, state):
    trigger, targets = moves
    if state in table.terminal or state in targets.values():
        assert table.next_state("x", state, trigger) == targets.get(state, state)
    elif state in targets:
        assert table.next_state("x", state, trigger) == targets[state]
    else:
        with pytest.raises(IllegalTransition, match=f"{state}.*{trigger}"):
            table.next_state("x", state, trigger)


@pytest.mark.parametrize(("table", "triggers"), MACHINES)
def test_the_tables_have_no_other_triggers(table, triggers):
    assert {trigger for _, trigger in table.moves} == set(triggers)


def test_a_placed_job_has_an_attempt_and_sends_one_start_command():
    case = place(queued().job, "at1", ("node1",), NOW)
    assert (case.job.state, case.attempt.state, case.attempt.number) == ("starting", "placed", 1)
    assert [type(command) for command in case.commands] == [StartExecution]
    assert (case.commands[0].attempt_id, case.commands[0].node_id) == ("at1", "node1")


def test_an_attempt_runs_finishes_and_succeeds():
    case = placed()
    states = []
    for revision, state in enumerate(("accepted", "starting", "running", "finishing"), 1):
        case = follow_execution(case, said(case, state, revision), NOW)
        states.append((case.attempt.state, case.job.state))
    case = follow_execution(case, said(case, "ended", 9, reason="exited", exit_code=0), NOW)
    assert states == [("starting", "starting")] * 2 + [("running", "running"), ("finishing", "running")]
    assert (case.attempt.state, case.job.state, case.job.exit_code) == ("succeeded", "succeeded", 0)


def test_a_job_that_does_not_start_yet_says_what_the_executor_waits_for():
    case = placed()
    waiting = follow_execution(case, said(case, "accepted", 2, detail="Ray has not reserved 1 CPU"), NOW)
    assert (waiting.job.state, waiting.job.detail) == ("starting", "Ray has not reserved 1 CPU")
    reserved = follow_execution(waiting, said(case, "starting", 4), NOW)
    assert (reserved.job.state, reserved.job.detail) == ("starting", "")
    stopping = ask_to_stop(case, NOW)
    assert follow_execution(stopping, said(case, "accepted", 2, detail="x"), NOW).job.detail == "is being stopped"


def test_an_end_that_overtakes_all_other_reports_is_enough():
    case = placed()
    ended = follow_execution(case, said(case, "ended", 5, reason="exited", exit_code=0), NOW)
    assert ended.job.state == "succeeded"
    assert follow_execution(ended, said(case, "running", 3), NOW) == ended


@pytest.mark.parametrize(
    ("facts", "state", "detail"),
    [
        ({"reason": "exited", "exit_code": 3}, "failed", "exit code 3"),
        ({"reason": "exited", "exit_code": 137, "signal": 9}, "failed", "ended by signal 9"),
        ({"reason": "timed_out"}, "timed_out", "ran longer than its limit of 60 s"),
        (
            {"reason": "out_of_memory", "peak_memory_bytes": 600 << 20},
            "failed",
            "out of memory: it used 600 MiB, its limit is 512 MiB",
        ),
        ({"reason": "refused", "detail": "no such environment"}, "failed", "no such environment"),
        ({"reason": "something new"}, "failed", "the executor ended it: something new"),
    ],
)
def test_each_end_gives_the_state_and_the_reason(facts, state, detail):
    case = placed(timeout_s=60, resources={"cpu_count": 1, "memory_bytes": 512 << 20})
    ended = follow_execution(case, said(case, "ended", **facts), NOW)
    assert (ended.job.state, ended.job.detail) == (state, detail)
    assert ended.job.ended_us == ended.attempt.ended_us == NOW


def test_a_failure_is_tried_again_until_the_retries_are_used():
    case = placed(max_retries=2)
    for tries in (1, 2):
        case = follow_execution(case, said(case, "ended", reason="exited", exit_code=3), NOW)
        assert (case.job.state, case.job.retries_used) == ("queued", tries)
        assert case.job.ready_us == NOW + retry_delay_s(tries) * SECOND
        assert case.job.detail == f"exit code 3; tried again in {retry_delay_s(tries):g} s"
        case = place(case.job, f"at{tries + 1}", ("node1",), NOW)
    case = follow_execution(case, said(case, "ended", reason="exited", exit_code=3), NOW)
    assert (case.job.state, case.job.attempt_count) == ("failed", 3)


@pytest.mark.parametrize(("reason", "end"), [("lost", "lost"), ("fenced", "lost")])
def test_a_lost_machine_costs_no_retry_of_the_user_and_at_most_five_times(reason, end):
    case = placed(max_retries=0)
    for tries in range(1, MAX_INFRA_RETRIES + 1):
        case = follow_execution(case, said(case, "ended", reason=reason), NOW)
        assert (case.job.state, case.attempt.state) == ("queued", end)
        assert (case.job.retries_used, case.job.infra_retries_used) == (0, tries)
        case = place(case.job, f"at{tries + 1}", ("node1",), NOW)
    case = follow_execution(case, said(case, "ended", reason=reason), NOW)
    assert case.job.state == "failed"
    assert case.job.detail.endswith("given up after 5 new tries")


def test_a_preemption_has_a_budget_of_its_own():
    case = placed(max_retries=0)
    for tries in range(1, MAX_PREEMPTIONS + 1):
        case = follow_execution(case, said(case, "ended", reason="stopped"), NOW)
        assert (case.job.state, case.attempt.state) == ("queued", "preempted")
        assert (case.job.retries_used, case.job.infra_retries_used, case.job.preemptions_used) == (0, 0, tries)
        case = place(case.job, f"at{tries + 1}", ("node1",), NOW)
    lost = follow_execution(case, said(case, "ended", reason="lost"), NOW)
    assert (lost.job.state, lost.job.infra_retries_used) == ("queued", 1)
    assert lost.job.ready_us == NOW + SECOND
    case = follow_execution(case, said(case, "ended", reason="stopped"), NOW)
    assert (case.job.state, case.job.detail[-28:]) == ("failed", "given up after 100 new tries")


@pytest.mark.parametrize(("jitter", "waited_s"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_jitter_spreads_what_failed_together(jitter, waited_s):
    case = placed(max_retries=1)
    again = follow_execution(case, said(case, "ended", reason="exited", exit_code=3), NOW, jitter)
    assert again.job.ready_us == NOW + int(waited_s * SECOND)
    assert again.job.detail == f"exit code 3; tried again in {waited_s:.2g} s"


def test_a_report_of_an_older_attempt_never_changes_the_job():
    first = placed(max_retries=1)
    again = follow_execution(first, said(first, "ended", reason="exited", exit_code=1), NOW)
    second = place(again.job, "at2", ("node2",), NOW)
    for state in ("accepted", "running", "finishing", "ended"):
        assert follow_execution(second, said(first, state, 99, reason="exited", exit_code=0), NOW) == second


def test_a_snapshot_is_applied_once():
    case = placed()
    running = follow_execution(case, said(case, "running", 4), NOW)
    assert follow_execution(running, said(case, "running", 4), NOW + 1) == running
    assert follow_execution(running, said(case, "starting", 3), NOW + 1) == running


# Every state in which a job can be asked to stop, as the reports that lead there.
EDGES = {
    "queued": None,
    "placed": [],
    "starting": ["accepted"],
    "running": ["running"],
    "finishing": ["running", "finishing"],
}


def at_edge(edge: str) -> Case:
    if EDGES[edge] is None:
        return queued(max_retries=3)
    case = placed(max_retries=3)
    for revision, state in enumerate(EDGES[edge], 1):
        case = follow_execution(case, said(case, state, revision), NOW)
    return case


@pytest.mark.parametrize("edge", EDGES)
def test_a_stop_is_obeyed_at_every_state(edge):
    case = at_edge(edge)
    asked = ask_to_stop(case, NOW)
    assert asked.job.desired_state == "cancelled"
    if edge == "queued":
        assert asked.job.state == "cancelled"
        return
    assert asked.commands == (StopExecution(attempt_id="at1", reason="cancelled"),)
    assert asked.job.detail == "is being stopped"
    assert ask_to_stop(asked, NOW).job == asked.job


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge != "queued"])
@pytest.mark.parametrize(
    "facts",
    [
        {"reason": "stopped"},
        {"reason": "exited", "exit_code": 0},
        {"reason": "exited", "exit_code": 1},
        {"reason": "timed_out"},
        {"reason": "lost"},
        {"reason": "out_of_memory"},
        {"reason": "refused"},
    ],
    ids=lambda facts: facts["reason"],
)
def test_a_stopped_job_is_cancelled_however_its_process_ends(edge, facts):
    asked = ask_to_stop(at_edge(edge), NOW)
    ended = follow_execution(asked, said(asked, "ended", 9, **facts), NOW)
    assert (ended.job.state, ended.attempt.state) == ("cancelled", "cancelled")


@pytest.mark.parametrize("edge", ["placed", "starting", "running", "finishing"])
def test_a_stop_after_the_end_changes_nothing(edge):
    case = at_edge(edge)
    ended = follow_execution(case, said(case, "ended", 9, reason="exited", exit_code=0), NOW)
    assert ask_to_stop(ended, NOW) == ended


@pytest.mark.parametrize(("edge", "state"), [("placed", "starting"), ("running", "running"), ("finishing", "running")])
def test_an_unreachable_job_comes_back_to_where_it_was(edge, state):
    away = lose_contact(at_edge(edge), "the executor is silent")
    assert (away.job.state, away.job.detail) == ("unreachable", "the executor is silent")
    assert regain_contact(away).job.state == state


@pytest.mark.parametrize(("said_state", "state"), [("accepted", "starting"), ("running", "running")])
def test_a_report_brings_an_unreachable_job_back(said_state, state):
    away = lose_contact(placed(), "")
    assert follow_execution(away, said(away, said_state), NOW).job.state == state


def test_only_an_attempt_never_heard_of_is_started_again():
    case = placed()
    assert [type(command) for command in missing_commands(case, known=False)] == [StartExecution]
    assert missing_commands(case, known=True) == ()
    heard = follow_execution(case, said(case, "accepted"), NOW)
    assert missing_commands(heard, known=False) == ()


def test_a_stop_is_repeated_until_the_attempt_has_ended():
    asked = ask_to_stop(at_edge("running"), NOW)
    assert [type(command) for command in missing_commands(asked, known=True)] == [StopExecution]
    ended = follow_execution(asked, said(asked, "ended", 9, reason="stopped"), NOW)
    assert missing_commands(ended, known=True) == ()


def test_a_stop_of_an_attempt_never_heard_of_follows_its_start():
    asked = ask_to_stop(placed(), NOW)
    assert [type(command) for command in missing_commands(asked, known=False)] == [StartExecution, StopExecution]


def test_retries_wait_longer_each_time_and_a_minute_at_most():
    assert [retry_delay_s(tries) for tries in (1, 2, 3, 7, 100)] == [1, 2, 4, 60, 60]


def test_what_the_executor_saw_is_kept_with_the_attempt():
    case = placed()
    facts = {"isolation": "bwrap", "addresses": {"3000": "127.0.0.1:4000"}, "gpu_indices": (1,), "peak_memory_bytes": 9}
    running = follow_execution(case, said(case, "running", **facts), NOW)
    ended = follow_execution(running, Execution(**said(case, "ended", 2, reason="exited").model_dump()), NOW)
    assert (running.attempt.addresses, ended.attempt.gpu_indices) == ({"3000": "127.0.0.1:4000"}, (1,))
    assert replace(ended.attempt).peak_memory_bytes == 9
    assert shapes.memory_text(3 << 29) == "1.5 GiB"


END = {
    "failure": {"reason": "exited", "exit_code": 3},
    "signal": {"reason": "exited", "exit_code": 137, "signal": 9},
    "out_of_memory": {"reason": "out_of_memory"},
    "node_lost": {"reason": "lost"},
    "start_failure": {"reason": "start_failure", "detail": "the registry did not answer"},
    "timed_out": {"reason": "timed_out"},
    "refused": {"reason": "refused", "detail": "there is no such image"},
}


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize(
    ("on", "retried"),
    [
        ((), {"failure", "signal", "node_lost", "start_failure"}),
        (("failure",), {"failure", "signal"}),
        (("exit:3",), {"failure"}),
        (("exit:137", "timed_out"), {"signal", "timed_out"}),
        (("out_of_memory", "start_failure"), {"out_of_memory", "start_failure"}),
        (("node_lost",), {"node_lost"}),
    ],
)
def test_only_the_named_causes_are_tried_again(end, on, retried):
    case = placed(max_retries=1, retry={"on": on})
    after = follow_execution(case, said(case, "ended", **END[end]), NOW)
    assert (after.job.state == "queued") is (end in retried)
    if end in retried:
        again = place(after.job, "at2", ("node1",), NOW)
        over = follow_execution(again, said(again, "ended", **END[end]), NOW)
        assert (over.job.state == "queued") is (end == "node_lost"), "only machines have more tries than the user gave"


def test_a_job_says_itself_how_long_its_tries_wait():
    case = placed(max_retries=9, retry={"delay_s": 10, "longest_s": 25})
    waits = []
    for tries in range(1, 5):
        case = follow_execution(case, said(case, "ended", reason="exited", exit_code=1), NOW)
        waits.append((case.job.ready_us - NOW) / SECOND)
        case = place(case.job, f"at{tries + 1}", ("node1",), NOW)
    assert waits == [10, 20, 25, 25]
    assert retry_delay_s(3, 1.0, Retry(delay_s=300)) == 300


def test_what_the_executor_adds_to_an_exit_is_kept():
    case = placed()
    told = "1 file was left out: it is a link that leads out of /artifacts"
    fine = follow_execution(case, said(case, "ended", reason="exited", exit_code=0, detail=told), NOW)
    assert (fine.job.state, fine.job.detail, fine.attempt.detail) == ("succeeded", told, told)
    bad = follow_execution(case, said(case, "ended", reason="exited", exit_code=2, detail=told), NOW)
    assert bad.job.detail == f"exit code 2; {told}"


def test_a_waiting_job_can_be_given_up_and_no_other():
    over = give_up(queued(), "waited as long as it may", "waited_too_long", NOW)
    assert (over.job.state, over.job.detail, over.job.ended_us) == ("failed", "waited as long as it may", NOW)
    with pytest.raises(IllegalTransition):
        give_up(placed(), "", "", NOW)


def test_another_try_runs_the_commit_and_the_packages_of_the_first() -> None:
    source = Source(kind="git", url="https://host/x.git", ref="main")
    case = placed(source=source, environment=Environment(kind="workspace", path="requirements.txt"), max_retries=2)
    found = {"commit": "a" * 40, "environment": "fs1"}
    after = follow_execution(case, said(case, "ended", reason="start_failure", origin=found), NOW)
    assert after.attempt
    assert (after.job.state, after.attempt.reason, after.attempt.origin) == ("queued", "start_failure", found)
    again = place(after.job, "at2", ("node2",), NOW, after.attempt.origin)
    command = again.commands[0]
    assert isinstance(command, StartExecution)
    assert command.template.source.ref == "a" * 40
    assert command.template.environment == Environment(kind="recorded", path="fs1")
    assert again.job.template.source.ref == "main"
    # What is found anew on the way adds to what is known, and takes nothing away.
    assert again.attempt
    seen = follow_execution(again, said(again, "starting", origin={"commit": "a" * 40}), NOW)
    assert seen.attempt
    assert seen.attempt.origin == found
