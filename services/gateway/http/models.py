"""The model repository: named models and their versions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import Field

from libs.common.contracts.messages import (
    GetModel,
    GetModelVersion,
    ListModels,
    ModelDetail,
    ModelPage,
    ModelVersion,
    RegisterModel,
)
from services.gateway.http.bodies import Body
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import API, Caller, Cursor, Knows, Limit, Ref, Wired, Word, answers_again
from services.gateway.http.projects import ProjectRef, resolve_active, resolve_id

router = APIRouter(prefix=API, tags=["models"], responses=RESPONSES)


class NewModelVersion(Body):
    project_id: ProjectRef = ""
    framework: Annotated[str, Field(max_length=100, examples=["sklearn"])] = ""
    description: Annotated[str, Field(max_length=10_000)] = ""
    fileset_id: Annotated[str, Field(max_length=64, description="A sealed file set of kind model or artifacts.")]
    job_id: Annotated[str, Field(max_length=64)] = ""
    metrics: dict[str, float] = Field(default_factory=dict)


@router.get("/models", summary="List models, newest first")
async def list_models(
    caller: Caller, parts: Wired, project_id: Word = "", cursor: Cursor = "", limit: Limit = 50
) -> ModelPage:
    project = await resolve_id(parts.owners, caller, project_id)
    return await parts.owners.ask(ListModels(project_id=project, cursor=cursor, limit=limit), ModelPage, caller)


@router.get("/models/{model}", summary="One model with its versions")
async def get_model(model: Ref, caller: Caller, parts: Wired, project_id: Word = "") -> ModelDetail:
    project = await resolve_id(parts.owners, caller, project_id)
    return await parts.owners.ask(GetModel(model_id=model, project_id=project), ModelDetail, caller)


@router.get("/models/{model}/versions/{number}", summary="One version; 0 is the newest")
async def get_model_version(
    model: Ref, number: Annotated[int, Path(ge=0, lt=2**31)], caller: Caller, parts: Wired, project_id: Word = ""
) -> ModelVersion:
    project = await resolve_id(parts.owners, caller, project_id)
    message = GetModelVersion(model_id=model, version=number, project_id=project)
    return await parts.owners.ask(message, ModelVersion, caller)


@router.post("/models/{model}/versions", status_code=201, summary="Register a version, and the model when it is new")
@answers_again(RegisterModel, ModelVersion)
async def register_model(model: Ref, body: NewModelVersion, caller: Caller, once: Knows, parts: Wired) -> ModelVersion:
    project = await resolve_active(parts.owners, caller, body.project_id)
    message = RegisterModel(
        name=model,
        project_id=project.id,
        framework=body.framework,
        description=body.description,
        fileset_id=body.fileset_id,
        job_id=body.job_id or caller.job_id,
        metrics=body.metrics,
    )
    # Its owner asks the owners of the files and of the job first.
    return await parts.owners.ask(message, ModelVersion, caller, once=once, timeout_s=10)
