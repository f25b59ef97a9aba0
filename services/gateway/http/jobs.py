"""Jobs: submit, watch, stop, and what they left behind."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import AwareDatetime, Field

from libs.common.contracts.messages import (
    CloneJob,
    ExplainJob,
    FilePage,
    GetJob,
    GetLog,
    GetMetrics,
    GetRun,
    Job,
    JobDetail,
    JobExplanation,
    JobPage,
    JobTemplate,
    ListFiles,
    ListJobs,
    LogPage,
    LogRun,
    MetricPage,
    Point,
    Principal,
    Resources,
    RetryJob,
    Run,
    StopJob,
    SubmitJob,
)
from services.gateway.http.bodies import Body
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import (
    API,
    Caller,
    Cursor,
    Id,
    Knows,
    Limit,
    Wired,
    Word,
    answers_again,
    content_endpoint,
)
from services.gateway.http.projects import ProjectRef, resolve_active, resolve_id
from services.gateway.ports import Owners

router = APIRouter(prefix=API, tags=["jobs"], responses=RESPONSES)

EXAMPLE_TEMPLATE = {"command": ["python train.py"], "resources": {"cpu_count": 1}}
MAX_POINTS = 10_000


class NewJob(Body):
    project_id: ProjectRef = ""
    template: Annotated[JobTemplate, Field(examples=[EXAMPLE_TEMPLATE])]
    experiment_id: Annotated[str, Field(max_length=64)] = ""


class Changes(Body):
    """What is left out stays as it was."""

    name: Annotated[str, Field(max_length=200)] = ""
    command: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    resources: Resources = Resources()
    machine_type: Annotated[str, Field(max_length=64)] = ""
    priority: int | None = None
    timeout_s: float | None = None
    max_retries: int | None = None


class NewPoint(Body):
    name: Annotated[str, Field(min_length=1, max_length=200, examples=["loss"])]
    value: Annotated[float, Field(allow_inf_nan=False, examples=[0.1])]
    step: int = 0
    at: AwareDatetime | None = None

    def message(self) -> Point:
        at: datetime | None = self.at
        return Point(name=self.name, value=self.value, step=self.step, at=at)


class NewMetrics(Body):
    points: Annotated[tuple[NewPoint, ...], Field(max_length=MAX_POINTS)] = ()
    params: dict[str, str] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)


@router.post("/jobs", status_code=201, summary="Submit a job")
@answers_again(SubmitJob, Job)
async def submit_job(body: NewJob, caller: Caller, once: Knows, parts: Wired) -> Job:
    project = await resolve_active(parts.owners, caller, body.project_id)
    message = SubmitJob(project_id=project.id, template=body.template, experiment_id=body.experiment_id)
    return await parts.owners.ask(message, Job, caller, once=once)


@router.get("/jobs", summary="List jobs, newest first")
async def list_jobs(
    *,
    caller: Caller,
    parts: Wired,
    project_id: Word = "",
    experiment_id: Word = "",
    state: Word = "",
    kind: Word = "",
    cursor: Cursor = "",
    limit: Limit = 50,
) -> JobPage:
    project = await resolve_id(parts.owners, caller, project_id)
    message = ListJobs(
        project_id=project, experiment_id=experiment_id, state=state, kind=kind, cursor=cursor, limit=limit
    )
    return await parts.owners.ask(message, JobPage, caller)


@router.get("/jobs/{job_id}", summary="One job with its attempts and its history")
async def get_job(job_id: Id, caller: Caller, parts: Wired) -> JobDetail:
    return await parts.owners.ask(GetJob(job_id=job_id), JobDetail, caller)


@router.post("/jobs/{job_id}/stop", summary="Stop a job; stopping a stopped one changes nothing")
async def stop_job(job_id: Id, caller: Caller, once: Knows, parts: Wired) -> Job:
    return await parts.owners.ask(StopJob(job_id=job_id), Job, caller, once=once)


@router.post("/jobs/{job_id}/retry", status_code=201, summary="Run a job that has ended again, as a new job")
async def retry_job(job_id: Id, caller: Caller, once: Knows, parts: Wired) -> Job:
    return await parts.owners.ask(RetryJob(job_id=job_id), Job, caller, once=once)


@router.post("/jobs/{job_id}/clone", status_code=201, summary="Run a job again with changes, as a new job")
async def clone_job(job_id: Id, body: Changes, caller: Caller, once: Knows, parts: Wired) -> Job:
    return await parts.owners.ask(CloneJob(job_id=job_id, **dict(body)), Job, caller, once=once)


@router.get("/jobs/{job_id}/explain", summary="Why the job is in its state; of a waiting one, what it waits for")
async def explain_job(job_id: Id, caller: Caller, parts: Wired) -> JobExplanation:
    return await parts.owners.ask(ExplainJob(job_id=job_id), JobExplanation, caller)


@router.get("/jobs/{job_id}/logs", summary="A page of the job's log", response_model_exclude={"slices", "unfinished"})
async def get_log(
    job_id: Id,
    caller: Caller,
    parts: Wired,
    after: Annotated[int, Query(ge=-100_000, description="Negative: the last so many lines.")] = 0,
    limit: Annotated[int, Query(ge=1, le=5000)] = 1000,
) -> LogPage:
    page = await parts.owners.ask(GetLog(job_id=job_id, after=after, limit=limit), LogPage, caller)
    if not page.last_sequence:
        await _must_exist(parts.owners, caller, job_id)
    return page


@router.get("/jobs/{job_id}/artifacts", summary="What the job left in /artifacts, with links")
async def list_artifacts(
    *, job_id: Id, request: Request, caller: Caller, parts: Wired, cursor: Cursor = "", limit: Limit = 50
) -> FilePage:
    endpoint = content_endpoint(request, parts)
    message = ListFiles(job_id=job_id, cursor=cursor, limit=limit, endpoint=endpoint)
    page = await parts.owners.ask(message, FilePage, caller)
    if not page.fileset.id:
        await _must_exist(parts.owners, caller, job_id)
    return page


async def _must_exist(owners: Owners, caller: Principal, job_id: str) -> None:
    """Raises NotFound for a mistyped id: storage cannot tell it from that of a job that has written nothing yet."""
    await owners.ask(GetJob(job_id=job_id), JobDetail, caller)


@router.get("/jobs/{job_id}/run", summary="The job's parameters, tags and last metrics")
async def get_run(job_id: Id, caller: Caller, parts: Wired) -> Run:
    return await parts.owners.ask(GetRun(job_id=job_id), Run, caller)


@router.get("/jobs/{job_id}/metrics", summary="The job's metrics as series")
async def get_metrics(
    job_id: Id,
    caller: Caller,
    parts: Wired,
    name: Word = "",
    max_points: Annotated[int, Query(ge=0, le=100_000)] = 0,
) -> MetricPage:
    message = GetMetrics(job_id=job_id, name=name, max_points=max_points)
    return await parts.owners.ask(message, MetricPage, caller)


@router.post("/jobs/{job_id}/metrics", summary="Record metrics, parameters and tags")
async def log_metrics(job_id: Id, body: NewMetrics, caller: Caller, once: Knows, parts: Wired) -> Run:
    message = LogRun(
        job_id=job_id,
        # The attempt is the token's, never the body's: an older attempt must not pass for a newer one.
        attempt=caller.attempt,
        points=tuple(point.message() for point in body.points),
        params=body.params,
        tags=body.tags,
    )
    return await parts.owners.ask(message, Run, caller, once=once)
