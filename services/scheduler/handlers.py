"""What the scheduler does with each message. Every function runs inside one open transaction."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from sqlalchemy import ColumnElement

from libs.common.clock import from_us, to_us
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    CloneJob,
    Execution,
    ExperimentCreated,
    ExperimentPage,
    ExplainJob,
    GetExperiment,
    GetJob,
    HaltJob,
    JobDetail,
    JobExplanation,
    JobPage,
    JobTemplate,
    ListExperiments,
    ListJobs,
    ListMachines,
    MachinePage,
    MachineType,
    NodesReported,
    OrderJob,
    Principal,
    Project,
    RetryJob,
    StartExperiment,
    StopJob,
    SubmitJob,
    TimelineEntry,
)
from libs.common.contracts.messages import Experiment as ExperimentMessage
from libs.common.contracts.messages import Job as JobMessage
from libs.common.errors import Conflict, Invalid, NotFound
from libs.common.ids import is_id, new_id
from libs.common.pages import decode_cursor, encode_cursor, page_limit
from libs.common.telemetry import current_traceparent, meter
from services.scheduler.domain.copies import cloned, retried
from services.scheduler.domain.explanations import explanation
from services.scheduler.domain.lifecycles import JOBS as JOB_STATES
from services.scheduler.domain.lifecycles import LIVE, admit, ask_to_stop, follow_execution, is_open
from services.scheduler.domain.machine_types import (
    MachineTypes,
    detected_types,
    nodes_that_have,
    resources_of,
    startable,
)
from services.scheduler.domain.model import Case, Experiment, Job
from services.scheduler.domain.snapshots import attempt_message, experiment_message, job_message
from services.scheduler.domain.templates import MAX_NAME_LENGTH, SERVICES, checked_template
from services.scheduler.store import GONE, UNHEARD, SchedulerUnit
from services.scheduler.tables import EXPERIMENTS, JOBS

# Answers stay well under NATS's 1 MB; what a job weighs beside its template is less than this.
PAGE_BYTES = 700_000
JOB_BYTES = 2_000
# Of those that hold machines, as many as an explanation names.
HOLDERS = 100

T = TypeVar("T")

log = logging.getLogger(__name__)

_ended = meter().create_counter("nabla_attempts_total", description="Attempts ended, by end")


class _ProjectEvent(Protocol):
    project: Project


class _ExecutionEvent(Protocol):
    execution: Execution


async def submit_job(message: SubmitJob, unit: SchedulerUnit, call: Envelope) -> JobMessage:
    principal = call.principal
    template = checked_template(message.template, types=machine_types(unit))
    await _check_project(unit, message.project_id, principal.team_id)
    if message.experiment_id:
        experiment = await _experiment(unit, message.experiment_id, principal.team_id)
        if experiment.project_id != message.project_id:
            raise _no_experiment(message.experiment_id)
    place = {"project_id": message.project_id, "experiment_id": message.experiment_id}
    return job_message(await _queue(unit, new_id("job"), template, principal, **place))


async def start_experiment(message: StartExperiment, unit: SchedulerUnit, call: Envelope) -> ExperimentMessage:
    principal = call.principal
    template = checked_template(message.template, types=machine_types(unit))
    _check_experiment(message)
    await _check_project(unit, message.project_id, principal.team_id)
    experiment = Experiment(
        id=new_id("experiment"),
        team_id=principal.team_id,
        project_id=message.project_id,
        name=message.name,
        kind="gang" if template.gang.type else "single",
        created_by=principal.id,
        created_us=unit.now_us,
    )
    await unit.add_experiment(experiment)
    place = {"project_id": message.project_id, "experiment_id": experiment.id}
    case = await _queue(unit, new_id("job"), template, principal, **place)
    snapshot = experiment_message(experiment, [case])
    await unit.emit(
        ExperimentCreated(experiment=snapshot),
        team_id=experiment.team_id,
        object_id=experiment.id,
        project_id=experiment.project_id,
        revision=snapshot.revision,
    )
    return snapshot


async def retry_job(message: RetryJob, unit: SchedulerUnit, call: Envelope) -> JobMessage:
    """Another job like one that has ended, in its place."""
    case = await _job(unit, message.job_id, call.principal)
    return await _copy(unit, case.job, retried(case), call.principal)


async def clone_job(message: CloneJob, unit: SchedulerUnit, call: Envelope) -> JobMessage:
    case = await _job(unit, message.job_id, call.principal)
    return await _copy(unit, case.job, cloned(case, message), call.principal)


async def order_job(message: OrderJob, unit: SchedulerUnit, call: Envelope) -> None:
    """The sender chose the id: ordering it again changes nothing."""
    if not is_id("job", message.job_id):
        raise Invalid("bad_job_id", f"{message.job_id[:60]!r} is not the id of a job.", "Use new_id('job').")
    if await unit.find(message.job_id):
        return
    template = checked_template(message.template, kinds=SERVICES)
    await _check_project(unit, message.project_id, call.team_id)
    sender = Principal(kind="service", id=call.source, team_id=call.team_id)
    await _queue(unit, message.job_id, template, sender, project_id=message.project_id)


async def stop_job(message: StopJob, unit: SchedulerUnit, call: Envelope) -> JobMessage:
    """The wish is committed first; what runs is told, and told again until it has ended."""
    case = await _job(unit, message.job_id, call.principal)
    return job_message(await unit.save(case, ask_to_stop(case, unit.now_us, _name(call.principal))))


async def halt_job(message: HaltJob, unit: SchedulerUnit, call: Envelope) -> None:
    case = await unit.find(message.job_id, call.team_id)
    if case:
        await unit.save(case, ask_to_stop(case, unit.now_us, call.source))


async def get_job(message: GetJob, view: SchedulerUnit, call: Envelope) -> JobDetail:
    case = await _job(view, message.job_id, call.principal)
    entries = await view.timeline(message.job_id)
    return JobDetail(
        job=job_message(case),
        attempts=tuple(attempt_message(case.job.template, attempt) for attempt in await view.attempts(message.job_id)),
        timeline=tuple(
            TimelineEntry(
                at=from_us(entry.at_us),
                state=entry.state,
                detail=entry.detail,
                attempt=entry.attempt,
                actor=entry.actor,
                cause=entry.cause,
                trace_id=entry.trace_id,
            )
            for entry in entries
        ),
    )


async def explain_job(message: ExplainJob, view: SchedulerUnit, call: Envelope) -> JobExplanation:
    """Why the job is in its state. The queue is looked at as it is in memory, a moment behind the database at most."""
    principal = call.principal
    case = await _job(view, message.job_id, principal)
    nodes = {node.id: node.hostname for inventory in await view.inventories() for node in inventory.nodes}
    holding = (JOBS.c.team_id == principal.team_id, JOBS.c.ended_us.is_(None), JOBS.c.state.in_(LIVE))
    holders = await view.cases(*holding, limit=HOLDERS) if case.job.state == "queued" else []
    return explanation(case, await view.newest_cause(case.job.id), view.policy, nodes, holders)


async def list_machines(_message: ListMachines, view: SchedulerUnit, _call: Envelope) -> MachinePage:
    cluster = view.policy.cluster
    hostnames = {node.id: node.hostname or node.id for each in await view.inventories() for node in each.nodes}
    types = machine_types(view)
    items = (
        MachineType(
            name=name,
            resources=resources_of(shape),
            startable=startable(shape, cluster.open_rooms()),
            hostnames=tuple(hostnames.get(node, node) for node in nodes_that_have(shape, cluster.machines)),
        )
        for name, shape in types.items()
    )
    source = "nodes" if view.machine_types.types() is None else "file"
    return MachinePage(items=tuple(items), source=source, detail="" if types else "no node has reported yet")


def machine_types(unit: SchedulerUnit) -> MachineTypes:
    """Those that the installation names, else those of its nodes."""
    named = unit.machine_types.types()
    return detected_types(unit.policy.cluster.machines) if named is None else named


async def list_jobs(message: ListJobs, view: SchedulerUnit, call: Envelope) -> JobPage:
    limit = page_limit(message.limit)
    cases = await view.cases(*_job_filters(message, call.principal), order=JOBS.c.id.desc(), limit=limit + 1)
    shown = _fitting(cases[:limit], _weight)
    more = len(shown) < len(cases)
    return JobPage(
        items=tuple(job_message(case) for case in shown),
        next_cursor=encode_cursor(shown[-1].job.id) if more else "",
    )


async def get_experiment(message: GetExperiment, view: SchedulerUnit, call: Envelope) -> ExperimentMessage:
    experiment = await _experiment(view, message.experiment_id, call.principal.team_id)
    cases = await view.cases(JOBS.c.experiment_id == experiment.id, limit=page_limit(0))
    return experiment_message(experiment, _fitting(cases, _weight))


async def list_experiments(message: ListExperiments, view: SchedulerUnit, call: Envelope) -> ExperimentPage:
    limit = page_limit(message.limit)
    wanted: list[ColumnElement[bool]] = [EXPERIMENTS.c.team_id == call.principal.team_id]
    if message.project_id:
        wanted.append(EXPERIMENTS.c.project_id == message.project_id)
    if message.cursor:
        wanted.append(EXPERIMENTS.c.id < decode_cursor(message.cursor))
    found = await view.experiments(*wanted, limit=limit + 1)
    jobs_of: dict[str, list[Case]] = {item.id: [] for item in found[:limit]}
    for case in await view.cases(JOBS.c.experiment_id.in_(jobs_of)):
        jobs_of[case.job.experiment_id].append(case)
    shown = _fitting(found[:limit], lambda item: JOB_BYTES + sum(map(_weight, jobs_of[item.id])))
    more = len(shown) < len(found)
    return ExperimentPage(
        items=tuple(experiment_message(item, jobs_of[item.id]) for item in shown),
        next_cursor=encode_cursor(shown[-1].id) if more else "",
    )


async def follow_report(message: _ExecutionEvent, unit: SchedulerUnit, _call: Envelope) -> None:
    """Applies what the executor says of an execution to its attempt and job."""
    await apply_execution(unit, message.execution)


async def apply_execution(unit: SchedulerUnit, execution: Execution) -> None:
    """The same for events and for answers to questions; older news and older attempts change nothing."""
    case = await unit.find(execution.job_id)
    if case is None:
        log.warning("execution of an unknown job", extra={"job": execution.job_id})
        return
    after = follow_execution(case, execution, unit.now_us, random.random())
    await unit.save(case, after)
    if case.attempt and after.attempt and is_open(case.attempt) and not is_open(after.attempt):
        _ended.add(1, {"end": after.attempt.state})


async def learn_nodes(message: NodesReported, unit: SchedulerUnit, call: Envelope) -> None:
    await unit.keep_inventory(call.source, message.nodes, message.detail, to_us(call.time))


async def learn_project(message: _ProjectEvent, unit: SchedulerUnit, _call: Envelope) -> None:
    project = message.project
    await unit.keep_project(project.id, project.team_id, project.state, project.revision)


async def _copy(unit: SchedulerUnit, job: Job, template: JobTemplate, principal: Principal) -> JobMessage:
    checked = checked_template(template, types=machine_types(unit))
    await _check_project(unit, job.project_id, principal.team_id)
    place = {"project_id": job.project_id, "experiment_id": job.experiment_id}
    return job_message(await _queue(unit, new_id("job"), checked, principal, **place))


async def _queue(
    unit: SchedulerUnit,
    job_id: str,
    template: JobTemplate,
    principal: Principal,
    *,
    project_id: str,
    experiment_id: str = "",
) -> Case:
    """Stores a new job, already in the queue, in the name of the principal."""
    job = Job(
        id=job_id,
        team_id=principal.team_id,
        project_id=project_id,
        template=template,
        created_us=unit.now_us,
        experiment_id=experiment_id,
        created_by=principal.id,
        traceparent=current_traceparent(),
    )
    return await unit.add(admit(job, unit.now_us, _name(principal)), f"by {_name(principal)}")


def _name(principal: Principal) -> str:
    return principal.name or principal.id


async def _check_project(unit: SchedulerUnit, project_id: str, team_id: str) -> None:
    """Refuses what is known to be wrong. An unknown project may be one whose event is still under way: it is let in,
    and the registry is asked before the next."""
    if not is_id("project", project_id):
        detail = f"{project_id[:60]!r} is not the id of a project."
        raise Invalid("bad_project_id", detail, "Name a project by the id that `nabla projects list` shows.")
    project = await unit.project(project_id)
    if project is None or (project.state in {UNHEARD, GONE} and project.team_id != team_id):
        await unit.await_project(project_id, team_id)
        return
    if project.team_id != team_id or project.state == GONE:
        raise NotFound("project_not_found", f"There is no project {project_id}.", "See `nabla projects list`.")
    if project.state in {"archived", "deleted"}:
        detail = f"The project is {project.state}, so nothing can run in it."
        raise Conflict(f"project_{project.state}", detail, f"`nabla projects restore {project_id}` brings it back.")


def _check_experiment(message: StartExperiment) -> None:
    if message.kind not in {"", "single"}:
        detail = f"An experiment of kind {message.kind[:40]!r} is not known."
        raise Invalid("bad_experiment", detail, "Use the kind single.", field="kind")
    if len(message.name) > MAX_NAME_LENGTH or not message.name.isprintable():
        remedy = f"Use at most {MAX_NAME_LENGTH} printable characters."
        raise Invalid("bad_experiment", "The name is too long, or cannot be shown.", remedy, field="name")


async def _job(unit: SchedulerUnit, job_id: str, principal: Principal) -> Case:
    case = await unit.find(job_id, principal.team_id) if is_id("job", job_id) else None
    if case is None or (principal.kind == "attempt" and principal.job_id != job_id):
        raise NotFound("job_not_found", f"There is no job {job_id[:60]}.", "See `nabla jobs list`.")
    return case


async def _experiment(unit: SchedulerUnit, experiment_id: str, team_id: str) -> Experiment:
    found = await unit.experiments(EXPERIMENTS.c.id == experiment_id, EXPERIMENTS.c.team_id == team_id)
    if not found:
        raise _no_experiment(experiment_id)
    return found[0]


def _no_experiment(experiment_id: str) -> NotFound:
    detail = f"There is no experiment {experiment_id[:60]}."
    return NotFound("experiment_not_found", detail, "See `nabla experiments list`.")


def _job_filters(message: ListJobs, principal: Principal) -> list[ColumnElement[bool]]:
    wanted: list[ColumnElement[bool]] = [JOBS.c.team_id == principal.team_id]
    if message.kind != "any":
        wanted.append(JOBS.c.kind == (message.kind or "command"))
    if message.project_id:
        wanted.append(JOBS.c.project_id == message.project_id)
    if message.experiment_id:
        wanted.append(JOBS.c.experiment_id == message.experiment_id)
    if message.state:
        if message.state not in JOB_STATES.states:
            raise Invalid("bad_state", f"{message.state[:40]!r} is not a state of a job.", "See `nabla jobs list`.")
        wanted.append(JOBS.c.state == message.state)
    if message.cursor:
        wanted.append(JOBS.c.id < decode_cursor(message.cursor))
    return wanted


def _fitting(items: Sequence[T], size: Callable[[T], int]) -> Sequence[T]:
    """As many of the first as fit one answer, and always one."""
    total = 0
    for index, item in enumerate(items):
        total += size(item)
        if total > PAGE_BYTES and index:
            return items[:index]
    return items


def _weight(case: Case) -> int:
    return len(case.job.template.to_wire()) + JOB_BYTES
