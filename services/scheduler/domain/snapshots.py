"""Jobs, attempts and experiments as messages: what events carry and queries answer."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from libs.common.clock import from_us
from libs.common.contracts import messages
from libs.common.contracts.gangs import ranks_of
from libs.common.contracts.message import Message
from services.scheduler.domain.members import phase_of
from services.scheduler.domain.model import Attempt, Case, Experiment

EVENTS: dict[str, type[Message]] = {
    "queued": messages.JobQueued,
    "starting": messages.JobStarting,
    "running": messages.JobRunning,
    "unreachable": messages.JobUnreachable,
    "succeeded": messages.JobSucceeded,
    "failed": messages.JobFailed,
    "cancelled": messages.JobCancelled,
    "timed_out": messages.JobTimedOut,
}


def event_of(case: Case) -> Message:
    """The event of the state that the job is in."""
    return EVENTS[case.job.state].model_validate({"job": job_message(case)})


def job_message(case: Case) -> messages.Job:
    job = case.job
    return messages.Job(
        id=job.id,
        team_id=job.team_id,
        project_id=job.project_id,
        experiment_id=job.experiment_id,
        template=job.template,
        state=job.state,
        detail=job.detail,
        desired_state=job.desired_state,
        revision=job.revision,
        created_at=from_us(job.created_us),
        queued_at=_moment(job.queued_us),
        started_at=_moment(job.started_us),
        ended_at=_moment(job.ended_us),
        exit_code=job.exit_code,
        attempt=attempt_message(job.template, case.attempt) if case.attempt else messages.Attempt(),
        created_by=job.created_by,
    )


def attempt_message(template: messages.JobTemplate, attempt: Attempt) -> messages.Attempt:
    return messages.Attempt(
        id=attempt.id,
        number=attempt.number,
        state=attempt.state,
        node_id=attempt.node_id,
        reason=attempt.reason,
        detail=attempt.detail,
        exit_code=attempt.exit_code,
        created_at=from_us(attempt.created_us),
        started_at=_moment(attempt.started_us),
        ended_at=_moment(attempt.ended_us),
        isolation=attempt.isolation,
        peak_memory_bytes=attempt.peak_memory_bytes,
        addresses=attempt.addresses,
        gpu_indices=attempt.gpu_indices,
        origin=attempt.origin,
        members=_member_messages(template, attempt),
    )


def _member_messages(template: messages.JobTemplate, attempt: Attempt) -> tuple[messages.Member, ...]:
    if not template.gang.type:
        return ()
    return tuple(
        messages.Member(
            rank=member.rank,
            role=rank.role,
            node_id=member.node_id,
            state=phase_of(member),
            reason=member.seen.reason,
            detail=member.seen.detail,
            exit_code=member.seen.exit_code,
            isolation=member.seen.isolation,
            peak_memory_bytes=member.seen.peak_memory_bytes,
            addresses=member.seen.addresses,
            gpu_indices=member.seen.gpu_indices,
        )
        for rank, member in zip(ranks_of(template), attempt.members, strict=True)
    )


def experiment_message(experiment: Experiment, cases: Iterable[Case]) -> messages.Experiment:
    return messages.Experiment(
        id=experiment.id,
        team_id=experiment.team_id,
        project_id=experiment.project_id,
        name=experiment.name,
        kind=experiment.kind,
        created_by=experiment.created_by,
        created_at=from_us(experiment.created_us),
        revision=1,
        jobs=tuple(job_message(case) for case in cases),
    )


def _moment(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else from_us(microseconds)
