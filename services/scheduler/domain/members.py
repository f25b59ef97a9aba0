"""The processes of one attempt: where they stand together, and which of them decides how it ends.

    type     decide                 follow, and are stopped once all that decide have ended well
    (none)   its one process
    torch    all
    grpc     master and workers     parameter servers, which wait for requests for ever
    mpi      the master             workers, on which it starts processes
    ray      the head's command     workers of the private cluster

Whoever ends otherwise than well before that decides at once, follower or not: all others are stopped. The attempt
has ended when all have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from libs.common.clock import to_us
from libs.common.contracts.gangs import ranks_of
from libs.common.contracts.messages import Execution, JobTemplate
from services.scheduler.domain.model import Attempt, Member

FOLLOWERS = {"grpc": {"ps"}, "mpi": {"worker"}, "ray": {"worker"}}
_PHASES = ("placed", "starting", "running", "finishing", "ended")


def seated(node_ids: Iterable[str]) -> tuple[Member, ...]:
    """New members on their nodes, by rank."""
    return tuple(Member(rank, node_id) for rank, node_id in enumerate(node_ids))


def takes(attempt: Attempt, execution: Execution) -> bool:
    """Whether the snapshot is news of one of the attempt's ranks.

    An end counts whatever its revision, as those of a restored database begin again; nothing follows it.
    """
    if not 0 <= execution.rank < len(attempt.members):
        return False
    seen = attempt.members[execution.rank].seen
    return seen.state != "ended" and (execution.state == "ended" or execution.revision > seen.revision)


def with_news(template: JobTemplate, attempt: Attempt, execution: Execution) -> Attempt:
    """The attempt with what the executor says of one rank, and with whom that makes decide its end."""
    members = tuple(
        replace(member, seen=execution) if member.rank == execution.rank else member for member in attempt.members
    )
    decided_by = attempt.decided_by if attempt.decided_by is not None else _decider(template, members, execution)
    return _with_facts(replace(attempt, members=members, decided_by=decided_by), execution)


def phase_of(member: Member) -> str:
    """placed starting running finishing ended."""
    state = member.seen.state
    if state in _PHASES:
        return state
    return "placed" if member.seen.revision < 0 else "starting"


def common_phase(members: Sequence[Member]) -> str:
    """The phase that all have reached; an attempt is starting as soon as the executor has one rank."""
    phases = [_PHASES.index(phase_of(member)) for member in members]
    return _PHASES[max(min(phases), min(max(phases), 1))]


def ends_well(execution: Execution) -> bool:
    return execution.reason == "exited" and execution.exit_code == 0 and not execution.signal


def is_being_ended(attempt: Attempt) -> bool:
    """Whether ranks are to be stopped because another one's end decided."""
    return attempt.decided_by is not None and common_phase(attempt.members) != "ended"


def deciding(attempt: Attempt) -> Member:
    """The rank whose end the attempt's is, once all have ended: of those that broke it, the one that ended first.

    Whose end was learned first is not enough: it may have failed because another did a moment earlier.
    """
    first = attempt.members[attempt.decided_by or 0]
    if ends_well(first.seen):
        return first
    broke = [member for member in attempt.members if member.rank == first.rank or _broke_by_itself(member.seen)]
    return min(broke, key=lambda member: (_ended_us(member.seen), member.rank != first.rank, member.rank))


def title(template: JobTemplate, rank: int) -> str:
    """A rank in words: "rank 2 (ps 0)"; empty for a job of one process."""
    if not template.gang.type:
        return ""
    found = ranks_of(template)[rank]
    return f"rank {rank} ({found.role} {found.index})" if len(template.gang.roles) > 1 else f"rank {rank}"


def _decider(template: JobTemplate, members: Sequence[Member], news: Execution) -> int | None:
    if news.state != "ended":
        return None
    if not ends_well(news):
        return news.rank
    followers = FOLLOWERS.get(template.gang.type, set())
    decisive = [member for member, rank in zip(members, ranks_of(template), strict=True) if rank.role not in followers]
    return news.rank if all(phase_of(member) == "ended" for member in decisive) else None


def _broke_by_itself(execution: Execution) -> bool:
    return execution.reason != "stopped" and not ends_well(execution)


def _ended_us(execution: Execution) -> int:
    return to_us(execution.ended_at) if execution.ended_at else 0


def _with_facts(attempt: Attempt, news: Execution) -> Attempt:
    """What is told of the attempt as a whole: that of rank 0, but the most memory, the latest start, and the reason
    of whoever is behind."""
    first = attempt.members[0].seen
    starts = [to_us(member.seen.started_at) for member in attempt.members if member.seen.started_at]
    alone = len(attempt.members) == 1
    return replace(
        attempt,
        execution_revision=max(news.revision, attempt.execution_revision),
        detail=news.detail if alone else _behind(attempt.members),
        exit_code=news.exit_code if alone else attempt.exit_code,
        isolation=first.isolation or attempt.isolation,
        peak_memory_bytes=max(news.peak_memory_bytes, attempt.peak_memory_bytes),
        addresses=first.addresses or attempt.addresses,
        gpu_indices=first.gpu_indices or attempt.gpu_indices,
        origin={**attempt.origin, **first.origin},
        started_us=max(starts) if len(starts) == len(attempt.members) else attempt.started_us,
    )


def _behind(members: Iterable[Member]) -> str:
    """Why the ranks that do not run yet do not."""
    return next((member.seen.detail for member in members if phase_of(member) == "starting" and member.seen.detail), "")
