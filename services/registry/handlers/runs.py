"""Runs: made from what the scheduler says of jobs, and filled by what jobs log."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Table

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    GetMetrics,
    GetRun,
    Job,
    JobCancelled,
    JobFailed,
    JobQueued,
    JobRunning,
    JobStarting,
    JobSucceeded,
    JobTimedOut,
    JobUnreachable,
    LogRun,
    MetricPage,
    Point,
    Principal,
    ProjectMoved,
    ProjectPurged,
    RecordUsage,
    Run,
    RunLogged,
    UsageRecorded,
)
from libs.common.errors import NotFound
from libs.common.ids import is_id
from libs.common.telemetry import meter
from services.registry.domain import runs as rules
from services.registry.store.runs import METRICS, PARAMS, TAGS, RunsUnit, Tracked

JobEvent = JobQueued | JobStarting | JobRunning | JobUnreachable | JobSucceeded | JobFailed | JobCancelled | JobTimedOut

_points = meter().create_counter("nabla_run_points_total", description="Metric points stored")


async def record_job(message: JobEvent, unit: RunsUnit, _call: Envelope) -> None:
    """Makes the job's run, or brings it to where the job is."""
    await apply_job(message.job, unit)


async def apply_job(job: Job, unit: RunsUnit) -> None:
    """Applies a snapshot of the job, unless a newer one was applied before."""
    run = await unit.runs.get(job.id)
    if run is None:
        await unit.runs.add(_run_of(job, unit))
        return
    if job.revision <= run.job_revision:
        return
    changed = replace(
        run,
        name=_name_of(job),
        state=job.state,
        attempt=max(run.attempt, job.attempt.number),
        job_revision=job.revision,
        created_at=job.created_at or run.created_at,
        ended_at=job.ended_at,
        checked_at=unit.now,
    )
    await unit.runs.save(changed)


async def log_run(message: LogRun, unit: RunsUnit, call: Envelope) -> Run:
    """Keeps points, params and tags; the same again changes nothing. Answers what it kept."""
    rules.check_log(message)
    run = await _run_to_log(message, unit, call.principal)
    attempt = rules.writing_attempt(_asked_attempt(message, call.principal), run.attempt)
    points = rules.latest(message.points)
    last = rules.last_values(points)
    await unit.runs.log_points(run.id, attempt, [_dated(point) for point in points])
    await unit.runs.log_last(run.id, attempt, last)
    await unit.runs.log_texts(PARAMS, run.id, message.params)
    await unit.runs.log_texts(TAGS, run.id, message.tags)
    await _check_counts(message, unit, run.id)
    saved = await unit.runs.save(replace(run, attempt=attempt))
    values = {name: point.value for name, point in last.items()}
    await _tell(unit, saved, values)
    _points.add(len(points))
    return _shown(saved, params=message.params, tags=message.tags, metrics=values)


async def get_run(message: GetRun, unit: RunsUnit, call: Envelope) -> Run:
    """The run with all its params and tags, and the last value of each metric."""
    run = await _visible_run(message.job_id, unit, call.principal)
    return _shown(
        run,
        params=await unit.runs.named_values(PARAMS, run.id),
        tags=await unit.runs.named_values(TAGS, run.id),
        metrics=await unit.runs.named_values(METRICS, run.id),
    )


async def get_metrics(message: GetMetrics, unit: RunsUnit, call: Envelope) -> MetricPage:
    """The run's series, each thinned so that the whole answer fits the bus."""
    run = await _visible_run(message.job_id, unit, call.principal)
    outline = await unit.runs.outline(run.id, message.name, message.prefix)
    most = rules.points_each(message.max_points or message.newest, len(outline))
    if message.newest > 0:
        newest = min(message.newest, most)
        found = {name: await unit.runs.newest_points(run.id, name, newest) for name in outline}
        return MetricPage(items=tuple(rules.series(name, points, most) for name, points in found.items()))
    size = {name: sum(each.point_count for each in stretches) for name, stretches in outline.items()}
    short = [name for name in outline if size[name] <= rules.LONG_SERIES]
    points = await unit.runs.points(run.id, short)
    items = []
    for name, stretches in outline.items():
        if name in points:
            items.append(rules.series(name, points[name], most))
        elif size[name] > rules.LONG_SERIES:
            items.append(await unit.runs.thinned_series(run.id, name, rules.bounds(stretches), most))
    return MetricPage(items=tuple(items))


async def record_usage(message: RecordUsage, unit: RunsUnit, call: Envelope) -> UsageRecorded:
    """Keeps what a node says of its attempts, and thins what it said long ago; the same again changes nothing.

    No event tells of it, and the run's revision stays: it happens every few seconds for each job that works.
    """
    rules.check_usage(message)
    kept = 0
    for usage in message.usages:
        run = await unit.runs.get(usage.job_id)
        if run is None or run.team_id != call.principal.team_id or usage.attempt < run.attempt:
            continue
        kept += 1
        points = rules.latest(usage.points)
        await unit.runs.log_points(run.id, usage.attempt, [_dated(point) for point in points])
        await unit.runs.log_last(run.id, usage.attempt, rules.last_values(points))
        for before_step, every in rules.thinnings(points):
            await unit.runs.thin(run.id, usage.attempt, rules.SYSTEM, before_step, every)
        _points.add(len(points))
    return UsageRecorded(run_count=kept)


async def move_runs(message: ProjectMoved, unit: RunsUnit, _call: Envelope) -> None:
    """Runs follow their project to its new team."""
    await unit.runs.move(message.project.id, message.project.team_id)


async def purge_runs(message: ProjectPurged, unit: RunsUnit, _call: Envelope) -> None:
    """Runs go with their project."""
    await unit.runs.remove_of(message.project.id)


def _run_of(job: Job, unit: RunsUnit) -> Tracked:
    return Tracked(
        id=job.id,
        team_id=job.team_id,
        project_id=job.project_id,
        name=_name_of(job),
        state=job.state,
        attempt=job.attempt.number,
        job_revision=job.revision,
        created_at=job.created_at or unit.now,
        ended_at=job.ended_at,
        checked_at=unit.now,
        revision=1,
    )


def _name_of(job: Job) -> str:
    return job.template.name[: rules.LONGEST_NAME] or job.id


async def _run_to_log(message: LogRun, unit: RunsUnit, principal: Principal) -> Tracked:
    """The run to write to. A job's first words may come before the event that the job runs."""
    job_id = message.job_id or principal.job_id
    if principal.kind != "attempt" or job_id != principal.job_id:
        return await _visible_run(job_id, unit, principal)
    found = await unit.runs.get(job_id)
    if found:
        return found
    run = Tracked(
        id=principal.job_id,
        team_id=principal.team_id,
        project_id=principal.project_id,
        name=principal.job_id,
        state="running",
        attempt=principal.attempt,
        job_revision=0,
        created_at=unit.now,
        ended_at=None,
        checked_at=unit.now,
        revision=1,
    )
    await unit.runs.add(run)
    return run


async def _visible_run(job_id: str, unit: RunsUnit, principal: Principal) -> Tracked:
    """The job's run within the principal's team; an attempt sees only its own."""
    run = await unit.runs.get(job_id) if is_id("job", job_id) else None
    foreign = principal.kind == "attempt" and job_id != principal.job_id
    if run is None or foreign or run.team_id != principal.team_id:
        detail = f"There is no run of a job {job_id[:50]!r} in this team."
        raise NotFound("run_not_found", detail, "See `nabla jobs list`; a job's run appears with its job.")
    return run


def _asked_attempt(message: LogRun, principal: Principal) -> int:
    """An attempt writes under its own number, whatever it says."""
    return principal.attempt if principal.kind == "attempt" else message.attempt


def _dated(point: Point) -> Point:
    return point.model_copy(update={"at": rules.as_utc(point.at)}) if point.at else point


async def _check_counts(message: LogRun, unit: RunsUnit, run_id: str) -> None:
    """Counted after writing: the names that a call repeats are no new ones. A refusal undoes the writing."""
    limits: tuple[tuple[bool, Table, str, int], ...] = (
        (bool(message.points), METRICS, "metrics", rules.MOST_METRIC_NAMES),
        (bool(message.params), PARAMS, "params", rules.MOST_PARAMS),
        (bool(message.tags), TAGS, "tags", rules.MOST_TAGS),
    )
    for touched, table, kind, most in limits:
        if touched:
            rules.check_count(await unit.runs.name_count(table, run_id), kind, most)


async def _tell(unit: RunsUnit, run: Tracked, values: dict[str, float]) -> None:
    shown = dict(list(values.items())[: rules.METRICS_IN_EVENT])
    await unit.emit(
        RunLogged(job_id=run.id, metrics=shown),
        team_id=run.team_id,
        object_id=run.id,
        project_id=run.project_id,
        revision=run.revision,
        attempt=run.attempt,
    )


def _shown(run: Tracked, *, params: dict[str, str], tags: dict[str, str], metrics: dict[str, float]) -> Run:
    return Run(
        job_id=run.id,
        team_id=run.team_id,
        project_id=run.project_id,
        name=run.name,
        state=run.state,
        params=params,
        tags=tags,
        metrics=metrics,
        created_at=run.created_at,
        ended_at=run.ended_at,
        revision=run.revision,
    )
