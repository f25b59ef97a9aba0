"""Experiments: a named template and its jobs."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field

from libs.common.contracts.messages import (
    Experiment,
    ExperimentPage,
    GetExperiment,
    JobTemplate,
    ListExperiments,
    StartExperiment,
)
from services.gateway.http.bodies import Body
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import API, Caller, Cursor, Id, Knows, Limit, Wired, Word, answers_again
from services.gateway.http.projects import ProjectRef, resolve_active, resolve_id
from services.gateway.http.secrets import check_secrets

router = APIRouter(prefix=API, tags=["experiments"], responses=RESPONSES)


class NewExperiment(Body):
    project_id: ProjectRef = ""
    name: Annotated[str, Field(max_length=200, examples=["baseline"])] = ""
    kind: Literal["single"] = "single"
    template: JobTemplate


@router.post("/experiments", status_code=201, summary="Start an experiment: its job is queued with it")
@answers_again(StartExperiment, Experiment)
async def start_experiment(body: NewExperiment, caller: Caller, once: Knows, parts: Wired) -> Experiment:
    project = await resolve_active(parts.owners, caller, body.project_id)
    await check_secrets(parts.owners, caller, project.id, body.template)
    message = StartExperiment(project_id=project.id, name=body.name, kind=body.kind, template=body.template)
    return await parts.owners.ask(message, Experiment, caller, once=once)


@router.get("/experiments", summary="List experiments, newest first")
async def list_experiments(
    caller: Caller, parts: Wired, project_id: Word = "", cursor: Cursor = "", limit: Limit = 50
) -> ExperimentPage:
    project = await resolve_id(parts.owners, caller, project_id)
    message = ListExperiments(project_id=project, cursor=cursor, limit=limit)
    return await parts.owners.ask(message, ExperimentPage, caller)


@router.get("/experiments/{experiment_id}", summary="One experiment with its jobs")
async def get_experiment(experiment_id: Id, caller: Caller, parts: Wired) -> Experiment:
    return await parts.owners.ask(GetExperiment(experiment_id=experiment_id), Experiment, caller)
