"""How a job and an attempt may move: two machines, and the functions that drive them together.

Job:
    from                             to           driven by
    submitted                        waiting      hold: something must come first
    submitted, waiting               queued       admit: the submission itself, or the end of the hold
    queued                           starting     place: the policy chose a node for each of its processes
    queued                           failed       give_up: it waited as long as it may, or no machine can ever run it
    starting, unreachable            running      run: the executor says that the process runs
    starting, running                unreachable  lose_contact: the executor, or the node, is silent, or the executor
                                                  no longer knows the attempt
    unreachable                      starting     resume: it is heard again and the process has not run yet
    unreachable                      running      run: it is heard again and the process runs
    starting, running, unreachable   queued       requeue: node lost, preempted, or a failure worth a retry
    starting, running, unreachable   succeeded    succeed: the process ended with 0
    starting, running, unreachable   failed       fail: it ended otherwise, or no machine would run it
    starting, running, unreachable   timed_out    time_out: it ran longer than its template allows
    every state but the last four    cancelled    cancel: somebody asked, and nothing runs any more

Attempt:
    from                                   to         driven by
    created                                placed     place: in the same commit as the job's
    placed                                 starting   accept: the executor has it and prepares the machine
    placed, starting                       running    run
    placed, starting, running              finishing  finish: the process ended, artifacts are being sealed
    placed, starting, running, finishing   succeeded  succeed
    placed, starting, running, finishing   failed     fail
    placed, starting, running, finishing   cancelled  cancel
    placed, starting, running, finishing   timed_out  time_out
    placed, starting, running, finishing   preempted  preempt: stopped, though nobody wanted the job cancelled
    placed, starting, running, finishing   lost       lose: fenced, or its machine is gone

Steps may be skipped, as a report may be overtaken by a later one; nothing ever moves back. An attempt of several
processes moves when all of them have come so far; see `members`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from libs.common.contracts.messages import Execution, Retry, Seat, StartExecution, StopExecution
from libs.common.transitions import TransitionTable
from services.scheduler.domain.members import (
    common_phase,
    deciding,
    ends_well,
    is_being_ended,
    seated,
    takes,
    title,
    with_news,
)
from services.scheduler.domain.model import Attempt, Case, Job
from services.scheduler.domain.origins import exact
from services.scheduler.domain.shapes import memory_text

MAX_INFRA_RETRIES = 5
# Nobody's fault, and as ordinary as a machine that is taken down for the night; bounded, as everything is.
MAX_PREEMPTIONS = 100
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
RETRIED = ("failure", "node_lost", "start_failure")
EXECUTOR = "executor"
CANCELLED = "cancelled"
DEFAULT_RETRY = Retry()
NOTHING_FOUND: Mapping[str, str] = MappingProxyType({})
BEING_STOPPED = "is being stopped"
FORGOTTEN = (
    "the executor no longer knows its attempt, as if its database had been restored from before: the attempt may "
    "still run on its node, so it is not run again by itself"
)

LIVE = ("starting", "running", "unreachable")
_OPEN = ("placed", "starting", "running", "finishing")
_ENDS = {"succeed": "succeeded", "fail": "failed", "cancel": CANCELLED, "time_out": "timed_out"}

JOBS = TransitionTable(
    aggregate="job",
    moves={
        ("submitted", "hold"): "waiting",
        ("submitted", "admit"): "queued",
        ("waiting", "admit"): "queued",
        ("queued", "place"): "starting",
        ("queued", "give_up"): "failed",
        ("starting", "run"): "running",
        ("unreachable", "run"): "running",
        ("unreachable", "resume"): "starting",
        ("starting", "lose_contact"): "unreachable",
        ("running", "lose_contact"): "unreachable",
        **{(state, "requeue"): "queued" for state in LIVE},
        **{(state, trigger): end for state in LIVE for trigger, end in _ENDS.items()},
        **{(state, "cancel"): CANCELLED for state in ("submitted", "waiting", "queued")},
    },
    terminal=frozenset(_ENDS.values()),
)

ATTEMPTS = TransitionTable(
    aggregate="attempt",
    moves={
        ("created", "place"): "placed",
        ("placed", "accept"): "starting",
        **{(state, "run"): "running" for state in ("placed", "starting")},
        **{(state, "finish"): "finishing" for state in ("placed", "starting", "running")},
        **{
            (state, trigger): end
            for state in _OPEN
            for trigger, end in (_ENDS | {"preempt": "preempted", "lose": "lost"}).items()
        },
    },
    terminal=frozenset({*_ENDS.values(), "preempted", "lost"}),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an ended execution means: the triggers of both machines, and why, for people and in one word.

    Args:
        retry: whose budget another try would use: "user", "infra", "preempted", or empty when there is to be none.
    """

    attempt_trigger: str
    job_trigger: str
    detail: str
    cause: str
    retry: str = ""


def admit(job: Job, now_us: int, actor: str) -> Case:
    """The new job in the queue. Its submission is the first entry of its timeline, this one the second."""
    return Case(replace(_move(job, "admit"), queued_us=now_us), cause="admitted", actor=actor)


def place(
    job: Job, attempt_id: str, node_ids: Iterable[str], now_us: int, origin: Mapping[str, str] = NOTHING_FOUND
) -> Case:
    """A new attempt with a node for each rank, and the command that starts it.

    Args:
        origin: what the attempt before found its code and packages to be; this one runs the same.
    """
    number = job.attempt_count + 1
    fresh = Attempt(id=attempt_id, number=number, created_us=now_us, members=seated(node_ids), origin=dict(origin))
    attempt = replace(fresh, state=ATTEMPTS.next_state(fresh.id, fresh.state, "place"))
    placed = replace(_move(job, "place"), attempt_count=number, started_us=None, exit_code=None)
    return Case(placed, attempt, (start_command(placed, attempt),), "placed")


def give_up(case: Case, reason: str, cause: str, now_us: int) -> Case:
    """A job that waits is not to wait any longer."""
    return Case(replace(_move(case.job, "give_up", reason), ended_us=now_us), case.attempt, cause=cause)


def ask_to_stop(case: Case, now_us: int, actor: str = "") -> Case:
    """Records that the job is unwanted; what runs is told to stop, what does not run is over at once."""
    job, attempt = case.job, case.attempt
    if job.state in JOBS.terminal or job.desired_state == CANCELLED:
        return case
    unwanted = replace(job, desired_state=CANCELLED)
    if attempt and is_open(attempt):
        return Case(
            replace(unwanted, detail=BEING_STOPPED), attempt, (stop_command(unwanted, attempt),), "stop_asked", actor
        )
    ended = replace(_move(unwanted, "cancel", "stopped before it ran"), ended_us=now_us)
    return Case(ended, attempt, cause="stop_asked", actor=actor)


def follow_execution(case: Case, execution: Execution, now_us: int, jitter: float = 1.0) -> Case:
    """The case after a snapshot of what the executor knows.

    A snapshot of another attempt than the job's newest, of one that has ended, or no newer than what was applied
    before, changes nothing. But an end counts whatever its revision: those of a restored database begin again.
    When it decides how a gang ends, the ranks that still run are told to stop.

    Args:
        jitter: by chance between 0 and 1; how much of a new try's delay is waited, so that not all come back at once.
    """
    attempt = case.attempt
    if attempt is None or attempt.id != execution.attempt_id or not is_open(attempt):
        return case
    if attempt.forgotten:
        attempt = replace(attempt, forgotten=False)
        case = regain_contact(Case(case.job, attempt))
    if not takes(attempt, execution):
        return case
    seen = with_news(case.job.template, attempt, execution)
    if attempt.decided_by is None and is_being_ended(seen):
        return replace(_moved(case.job, seen, now_us, jitter), commands=(stop_command(case.job, seen),))
    return _moved(case.job, seen, now_us, jitter)


def _moved(job: Job, seen: Attempt, now_us: int, jitter: float) -> Case:
    match common_phase(seen.members):
        case "ended":
            return _ended(job, seen, now_us, jitter)
        case "running":
            return _running(job, _move_attempt(seen, "run"), _why_ending(job, seen), now_us, "started")
        case "finishing":
            detail = _why_ending(job, seen) or "its artifacts are being sealed"
            return _running(job, _move_attempt(seen, "finish"), detail, now_us, "process_ended")
        case _:
            return _accepted(job, _move_attempt(seen, "accept"))


def _why_ending(job: Job, attempt: Attempt) -> str:
    """Of a gang whose end is decided while some of its ranks still run."""
    if attempt.decided_by is None:
        return ""
    decided = attempt.members[attempt.decided_by]
    if ends_well(decided.seen):
        return "its work is done; the other ranks are being ended"
    detail = outcome_of(job, decided.seen).detail
    return f"{title(job.template, decided.rank)}: {detail}; the other ranks are being stopped"


def lose_contact(case: Case, detail: str) -> Case:
    """Shown as unreachable, and left alone: only the executor may say that an attempt is lost."""
    return Case(_move(case.job, "lose_contact", detail), case.attempt, cause="contact_lost")


def forget(case: Case) -> Case:
    """The executor knows no more of an attempt of which it told before: shown, and left alone."""
    attempt = case.attempt
    if attempt is None or not is_open(attempt):
        return case
    return Case(_move(case.job, "lose_contact", FORGOTTEN), replace(attempt, forgotten=True), cause="forgotten")


def regain_contact(case: Case) -> Case:
    ran = case.attempt is not None and case.attempt.state in {"running", "finishing"}
    return Case(_move(case.job, "run" if ran else "resume"), case.attempt, cause="contact_regained")


def missing_commands(case: Case, *, known: bool) -> tuple[StartExecution | StopExecution, ...]:
    """The commands whose effect is not to be seen, to be sent again.

    Only an attempt never heard of is started again, under the same id, which the executor takes once. It is
    started even when the job is unwanted by now: the first command may still be under way, and a stop that
    overtook it would be forgotten.

    Args:
        known: whether the executor knows this attempt.
    """
    job, attempt = case.job, case.attempt
    if attempt is None or not is_open(attempt):
        return ()
    start = (start_command(job, attempt),) if not known and attempt.execution_revision < 0 else ()
    stop = (stop_command(job, attempt),) if job.desired_state == CANCELLED or is_being_ended(attempt) else ()
    return (*start, *stop)


def outcome_of(job: Job, execution: Execution) -> Outcome:
    """What the end of an execution means for its job, before retries are counted.

    A job that somebody stopped is cancelled however its process ended: the stop was confirmed first.
    """
    if job.desired_state == CANCELLED:
        return Outcome("cancel", "cancel", "stopped on request", "stopped")
    outcome = _exited(execution) if execution.reason == "exited" else _broken_off(job, execution)
    if outcome.retry in {"user", "infra"} and not _deserves_another(job, outcome.cause, execution):
        return replace(outcome, retry="")
    return outcome


def _deserves_another(job: Job, cause: str, execution: Execution) -> bool:
    """Whether the template names the cause of this end among those that are tried again."""
    named = set(job.template.retry.on or RETRIED)
    return cause in named or (cause == "failure" and f"exit:{_shell_code(execution)}" in named)


def _shell_code(execution: Execution) -> int | None:
    """The exit code as a shell says it: 128 and its number for a signal."""
    return 128 + execution.signal if execution.signal else execution.exit_code


def _broken_off(job: Job, execution: Execution) -> Outcome:
    detail = execution.detail
    match execution.reason:
        case "stopped":
            stopped = detail or "its process was stopped on the machine"
            return Outcome("preempt", "fail", stopped, "preempted", retry="preempted")
        case "timed_out":
            limit = f"ran longer than its limit of {job.template.timeout_s:g} s"
            return Outcome("time_out", "time_out", detail or limit, "timed_out", retry="user")
        case "out_of_memory":
            return Outcome("fail", "fail", _memory_detail(job, execution), "out_of_memory", retry="user")
        case "fenced" | "lost":
            return Outcome("lose", "fail", detail or "the machine that ran it was lost", "node_lost", retry="infra")
        case "start_failure":
            return Outcome("fail", "fail", detail or "it could not be started", "start_failure", retry="user")
    # What is refused would be refused again.
    return Outcome("fail", "fail", detail or f"the executor ended it: {execution.reason}", execution.reason)


def _exited(execution: Execution) -> Outcome:
    if execution.exit_code == 0 and not execution.signal:
        return Outcome("succeed", "succeed", execution.detail, "exited")
    by_signal = f"ended by signal {execution.signal}"
    code = by_signal if execution.signal else f"exit code {execution.exit_code}"
    detail = f"{code}; {execution.detail}" if execution.detail else code
    return Outcome("fail", "fail", detail, "failure", retry="user")


def retry_delay_s(tries: int, jitter: float = 1.0, retry: Retry = DEFAULT_RETRY) -> float:
    """Seconds before try `tries` + 1: 1, 2, 4, up to a minute, or as the job says; with the least jitter half of it."""
    first_s = retry.delay_s or FIRST_DELAY_S
    longest_s = retry.longest_s or max(first_s, LONGEST_DELAY_S)
    return min(first_s * 2.0 ** min(tries - 1, 32), longest_s) * (1 + jitter) / 2


def is_open(attempt: Attempt) -> bool:
    """Whether the attempt may still run somewhere, so that it holds its machine's resources."""
    return attempt.state not in ATTEMPTS.terminal


def start_command(job: Job, attempt: Attempt) -> StartExecution:
    return StartExecution(
        attempt_id=attempt.id,
        job_id=job.id,
        number=attempt.number,
        project_id=job.project_id,
        node_id=attempt.node_id,
        experiment_id=job.experiment_id,
        template=exact(job.template, attempt.origin),
        seats=_seats(job, attempt),
    )


def _seats(job: Job, attempt: Attempt) -> tuple[Seat, ...]:
    if not job.template.gang.type:
        return ()
    return tuple(Seat(rank=member.rank, node_id=member.node_id) for member in attempt.members)


def stop_command(job: Job, attempt: Attempt) -> StopExecution:
    """Stops what runs of the attempt: because somebody asked, or because the end of one of its ranks decided."""
    reason = CANCELLED if job.desired_state == CANCELLED else _why_ending(job, attempt)
    return StopExecution(attempt_id=attempt.id, reason=reason)


def _accepted(job: Job, attempt: Attempt) -> Case:
    """Not running yet; why not, the executor may know."""
    if job.state == "unreachable":
        job = _move(job, "resume")
    if job.desired_state != CANCELLED:
        job = replace(job, detail=attempt.detail)
    return Case(job, attempt, cause="accepted", actor=EXECUTOR)


def _running(job: Job, attempt: Attempt, detail: str, now_us: int, cause: str) -> Case:
    started_us = attempt.started_us or now_us
    moved = replace(_move(job, "run", detail), started_us=started_us)
    return Case(moved, replace(attempt, started_us=started_us), cause=cause, actor=EXECUTOR)


def _ended(job: Job, attempt: Attempt, now_us: int, jitter: float) -> Case:
    decided = deciding(attempt)
    execution, outcome = decided.seen, outcome_of(job, decided.seen)
    if job.template.gang.type and not ends_well(execution) and job.desired_state != CANCELLED:
        outcome = replace(outcome, detail=f"{title(job.template, decided.rank)}: {outcome.detail}")
    attempt = replace(attempt, exit_code=execution.exit_code, reason=execution.reason)
    over = replace(_move_attempt(attempt, outcome.attempt_trigger), ended_us=now_us, detail=outcome.detail)
    tries_left = _tries_left(job, outcome.retry)
    if tries_left > 0:
        return Case(_requeued(job, outcome, now_us, jitter), over, cause=outcome.cause, actor=EXECUTOR)
    detail = outcome.detail
    if outcome.retry in {"infra", "preempted"}:
        detail += f"; given up after {_tries_used(job, outcome.retry)} new tries"
    ended = replace(_move(job, outcome.job_trigger, detail), ended_us=now_us, exit_code=execution.exit_code)
    return Case(ended, over, cause=outcome.cause, actor=EXECUTOR)


def _tries_left(job: Job, budget: str) -> int:
    most = {"user": job.template.max_retries, "infra": MAX_INFRA_RETRIES, "preempted": MAX_PREEMPTIONS}
    return most[budget] - _tries_used(job, budget) if budget else 0


def _tries_used(job: Job, budget: str) -> int:
    used = {"user": job.retries_used, "infra": job.infra_retries_used, "preempted": job.preemptions_used}
    return used[budget]


def _counted(job: Job, budget: str) -> Job:
    match budget:
        case "user":
            return replace(job, retries_used=job.retries_used + 1)
        case "infra":
            return replace(job, infra_retries_used=job.infra_retries_used + 1)
        case _:
            return replace(job, preemptions_used=job.preemptions_used + 1)


def _requeued(job: Job, outcome: Outcome, now_us: int, jitter: float) -> Job:
    counted = _counted(job, outcome.retry)
    delay_s = retry_delay_s(_tries_used(counted, outcome.retry), jitter, job.template.retry)
    detail = f"{outcome.detail}; tried again in {delay_s:.2g} s"
    return replace(
        _move(counted, "requeue", detail),
        queued_us=now_us,
        ready_us=now_us + int(delay_s * 1_000_000),
        started_us=None,
    )


def _memory_detail(job: Job, execution: Execution) -> str:
    peak, limit = execution.peak_memory_bytes, job.template.resources.memory_bytes
    allowed = f"its limit is {memory_text(limit)}" if limit else "the machine had no more"
    return f"out of memory: it used {memory_text(peak)}, {allowed}"


def _move(job: Job, trigger: str, detail: str = "") -> Job:
    state = JOBS.next_state(job.id, job.state, trigger)
    if state in {"starting", "running"} and job.desired_state == CANCELLED:
        detail = BEING_STOPPED
    return replace(job, state=state, detail=detail)


def _move_attempt(attempt: Attempt, trigger: str) -> Attempt:
    return replace(attempt, state=ATTEMPTS.next_state(attempt.id, attempt.state, trigger))
