"""Deployments: a registered model behind an endpoint."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from libs.common.contracts.messages import (
    CreateDeployment,
    DeleteDeployment,
    Deployment,
    DeploymentPage,
    GetDeployment,
    GetModelVersion,
    ListDeployments,
    ListMachines,
    MachinePage,
    ModelVersion,
    Principal,
    Resources,
)
from libs.common.errors import Invalid
from services.gateway.http.bodies import Body
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import API, Caller, Cursor, Knows, Limit, Parts, Ref, Wired, Word, answers_again
from services.gateway.http.projects import ProjectRef, resolve_active, resolve_id

router = APIRouter(prefix=API, tags=["deployments"], responses=RESPONSES)


class NewDeployment(Body):
    name: Annotated[str, Field(max_length=63, examples=["digits"])]
    project_id: Annotated[ProjectRef, Field(description="The model's own when left out.")] = ""
    model: Annotated[str, Field(max_length=220, description="NAME or NAME:VERSION.", examples=["digits:3"])]
    resources: Resources = Field(default_factory=Resources)
    machine_type: Annotated[str, Field(max_length=63, description="What resources leave open.", examples=["cpu-2"])] = (
        ""
    )


def parse_model(text: str) -> tuple[str, int]:
    """`digits:3` as ("digits", 3); without a version 0, which is the newest.

    Raises:
        Invalid: the part after the colon is not a version number.
    """
    name, colon, version = text.partition(":")
    if not colon:
        return name, 0
    if not version.isascii() or not version.isdigit() or not 0 < int(version[:10]) < 2**31:
        detail = f"{version[:50]!r} is not a version number."
        raise Invalid("bad_model_version", detail, "Write NAME or NAME:VERSION, such as digits:3.")
    return name, int(version[:10])


async def machine_of(body: NewDeployment, caller: Principal, parts: Parts) -> Resources:
    """What a replica asks for: what was said, and of the rest what its machine type has now.

    Raises:
        Invalid: there is no such type.
    """
    if not body.machine_type:
        return body.resources
    page = await parts.owners.ask(ListMachines(), MachinePage, caller)
    types = {item.name: item.resources for item in page.items}
    if body.machine_type not in types:
        known = f"there are {', '.join(types)}" if types else page.detail or "there is none"
        detail = f"There is no machine type {body.machine_type!r}; {known}."
        raise Invalid("bad_machine_type", detail, "See `nabla machines`.", field="machine_type")
    return types[body.machine_type].model_copy(update={name: value for name, value in body.resources if value})


@router.post("/deployments", status_code=201, summary="Deploy a model")
@answers_again(CreateDeployment, Deployment)
async def create_deployment(body: NewDeployment, caller: Caller, once: Knows, parts: Wired) -> Deployment:
    name, number = parse_model(body.model)
    wanted = await resolve_id(parts.owners, caller, body.project_id)
    question = GetModelVersion(model_id=name, version=number, project_id=wanted)
    version = await parts.owners.ask(question, ModelVersion, caller)
    project = await resolve_active(parts.owners, caller, wanted or version.project_id)
    message = CreateDeployment(
        name=body.name,
        project_id=project.id,
        model_id=version.model_id,
        model_name=version.model_name,
        model_version=version.version,
        framework=version.framework,
        model_fileset_id=version.fileset_id,
        resources=await machine_of(body, caller, parts),
    )
    return await parts.owners.ask(message, Deployment, caller, once=once)


@router.get("/deployments", summary="List deployments, newest first")
async def list_deployments(
    caller: Caller, parts: Wired, project_id: Word = "", cursor: Cursor = "", limit: Limit = 50
) -> DeploymentPage:
    project = await resolve_id(parts.owners, caller, project_id)
    message = ListDeployments(project_id=project, cursor=cursor, limit=limit)
    return await parts.owners.ask(message, DeploymentPage, caller)


@router.get("/deployments/{deployment}", summary="One deployment, with its endpoint's token for those who may call it")
async def get_deployment(deployment: Ref, caller: Caller, parts: Wired) -> Deployment:
    return await parts.owners.ask(GetDeployment(deployment_id=deployment), Deployment, caller)


@router.delete("/deployments/{deployment}", summary="Take a deployment down")
async def delete_deployment(deployment: Ref, caller: Caller, once: Knows, parts: Wired) -> Deployment:
    return await parts.owners.ask(DeleteDeployment(deployment_id=deployment), Deployment, caller, once=once)
