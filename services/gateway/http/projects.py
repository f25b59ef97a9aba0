"""Projects: what everything else belongs to. A project is named by id or by name wherever one is asked for."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from libs.common.contracts.messages import (
    ArchiveProject,
    CreateProject,
    DeleteProject,
    GetProject,
    ListProjects,
    MoveProject,
    Principal,
    Project,
    ProjectPage,
    RestoreProject,
    UpdateProject,
)
from libs.common.errors import Conflict, Invalid
from libs.common.ids import is_id
from services.gateway.http.bodies import Body
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import API, Caller, Cursor, Knows, Limit, Ref, Wired, Word, answers_again
from services.gateway.ports import Owners

router = APIRouter(prefix=API, tags=["projects"], responses=RESPONSES)

ProjectRef = Annotated[str, Field(max_length=200, description="Id or name of a project.", examples=["digits"])]


class NewProject(Body):
    name: Annotated[str, Field(max_length=200, examples=["digits"])]
    description: Annotated[str, Field(max_length=10_000)] = ""


class ProjectChange(Body):
    """What is left out stays as it is."""

    name: Annotated[str | None, Field(max_length=200)] = None
    description: Annotated[str | None, Field(max_length=10_000)] = None


class NewOwner(Body):
    team_id: Annotated[str, Field(max_length=64)]


async def resolve(owners: Owners, caller: Principal, ref: str) -> Project:
    """The project of this id or name; a running job that names none means its own.

    Raises:
        Invalid: no project is named.
        NotFound: there is none, or not for this caller.
    """
    wanted = ref or caller.project_id
    if not wanted:
        raise Invalid("project_missing", "The request names no project.", "Add project_id: a project's id or name.")
    return await owners.ask(GetProject(project_id=wanted), Project, caller)


async def resolve_active(owners: Owners, caller: Principal, ref: str) -> Project:
    """Like `resolve`, for what is going to be added to the project.

    Raises:
        Conflict: it is archived or deleted.
    """
    project = await resolve(owners, caller, ref)
    if project.state not in ("", "active"):
        detail = f"The project {project.name} is {project.state}, so nothing can be added to it."
        remedy = f"Restore it first: `nabla projects restore {project.name}`."
        raise Conflict(f"project_{project.state}", detail, remedy, project_id=project.id)
    return project


async def resolve_id(owners: Owners, caller: Principal, ref: str) -> str:
    """The project id for a filter: empty stays empty, an id is taken as it is."""
    if not ref or is_id("project", ref):
        return ref
    return (await resolve(owners, caller, ref)).id


@router.post("/projects", status_code=201, summary="Create a project")
async def create_project(body: NewProject, caller: Caller, once: Knows, parts: Wired) -> Project:
    message = CreateProject(name=body.name, description=body.description)
    return await parts.owners.ask(message, Project, caller, once=once)


@router.get("/projects", summary="List projects, newest first")
async def list_projects(
    caller: Caller, parts: Wired, state: Word = "", cursor: Cursor = "", limit: Limit = 50
) -> ProjectPage:
    return await parts.owners.ask(ListProjects(state=state, cursor=cursor, limit=limit), ProjectPage, caller)


@router.get("/projects/{project}", summary="One project")
async def get_project(project: Ref, caller: Caller, parts: Wired) -> Project:
    return await resolve(parts.owners, caller, project)


@router.patch("/projects/{project}", summary="Rename a project or change its description")
@answers_again(UpdateProject, Project)
async def update_project(project: Ref, body: ProjectChange, caller: Caller, once: Knows, parts: Wired) -> Project:
    project_id = await resolve_id(parts.owners, caller, project)
    message = UpdateProject(project_id=project_id, name=body.name, description=body.description)
    return await parts.owners.ask(message, Project, caller, once=once)


@router.post("/projects/{project}/archive", summary="Archive a project: it stays readable")
@answers_again(ArchiveProject, Project)
async def archive_project(project: Ref, caller: Caller, once: Knows, parts: Wired) -> Project:
    project_id = await resolve_id(parts.owners, caller, project)
    return await parts.owners.ask(ArchiveProject(project_id=project_id), Project, caller, once=once)


@router.post("/projects/{project}/restore", summary="Undo archive, or a delete of late")
@answers_again(RestoreProject, Project)
async def restore_project(project: Ref, caller: Caller, once: Knows, parts: Wired) -> Project:
    project_id = await resolve_id(parts.owners, caller, project)
    return await parts.owners.ask(RestoreProject(project_id=project_id), Project, caller, once=once)


@router.post("/projects/{project}/move", summary="Give a project to another team")
@answers_again(MoveProject, Project)
async def move_project(project: Ref, body: NewOwner, caller: Caller, once: Knows, parts: Wired) -> Project:
    project_id = await resolve_id(parts.owners, caller, project)
    message = MoveProject(project_id=project_id, team_id=body.team_id)
    return await parts.owners.ask(message, Project, caller, once=once)


@router.delete("/projects/{project}", summary="Delete a project; it can be restored for some days")
@answers_again(DeleteProject, Project)
async def delete_project(project: Ref, caller: Caller, once: Knows, parts: Wired) -> Project:
    project_id = await resolve_id(parts.owners, caller, project)
    return await parts.owners.ask(DeleteProject(project_id=project_id), Project, caller, once=once)
