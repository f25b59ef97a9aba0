"""Projects: made, changed, moved, archived, deleted and brought back."""

from __future__ import annotations

from typing import Any

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    ArchiveProject,
    CreateProject,
    DeleteProject,
    GetProject,
    ListProjects,
    MoveProject,
    Principal,
    Project,
    ProjectArchived,
    ProjectCreated,
    ProjectDeleted,
    ProjectMoved,
    ProjectPage,
    ProjectRestored,
    ProjectUpdated,
    RestoreProject,
    UpdateProject,
)
from libs.common.errors import Conflict, Forbidden, NotFound
from libs.common.ids import is_id, new_id
from services.registry.domain import projects as rules
from services.registry.store import RegistryUnit

ProjectEvent = ProjectCreated | ProjectUpdated | ProjectArchived | ProjectDeleted | ProjectRestored | ProjectMoved


async def create_project(message: CreateProject, unit: RegistryUnit, call: Envelope) -> Project:
    """A new project of the caller's team."""
    team_id, name = call.principal.team_id, rules.checked_name(message.name)
    description = rules.checked_description(message.description)
    await _refuse_taken(unit, name, team_id)
    project = Project(
        id=new_id("project"),
        team_id=team_id,
        name=name,
        description=description,
        state="active",
        created_by=call.principal.id,
        created_at=unit.now,
        updated_at=unit.now,
        revision=1,
    )
    await unit.projects.add(project)
    await _tell(unit, ProjectCreated(project=project))
    return project


async def update_project(message: UpdateProject, unit: RegistryUnit, call: Envelope) -> Project:
    """Another name or description; fields that are not given stay."""
    project = await visible_project(unit, call.principal, message.project_id)
    rules.state_after(project, "update")
    name = project.name if message.name is None else rules.checked_name(message.name)
    given = project.description if message.description is None else message.description
    description = rules.checked_description(given)
    if (name, description) == (project.name, project.description):
        return project
    if name != project.name:
        await _refuse_taken(unit, name, project.team_id)
    changed = await _save(unit, project, name=name, description=description)
    await _tell(unit, ProjectUpdated(project=changed))
    return changed


async def archive_project(message: ArchiveProject, unit: RegistryUnit, call: Envelope) -> Project:
    """Puts a project aside: it stays readable and takes nothing new."""
    project = await visible_project(unit, call.principal, message.project_id)
    state = rules.state_after(project, "archive")
    if state == project.state:
        return project
    changed = await _save(unit, project, state=state)
    await _tell(unit, ProjectArchived(project=changed))
    return changed


async def delete_project(message: DeleteProject, unit: RegistryUnit, call: Envelope) -> Project:
    """Deletes a project; for a while it can be restored, then it is purged."""
    project = await visible_project(unit, call.principal, message.project_id)
    state = rules.state_after(project, "delete")
    if state == project.state:
        return project
    changed = await _save(unit, project, state=state)
    await _tell(unit, ProjectDeleted(project=changed))
    return changed


async def restore_project(message: RestoreProject, unit: RegistryUnit, call: Envelope) -> Project:
    """Undoes archive, and delete, which only those may who may delete."""
    project = await _restorable(unit, call.principal, message.project_id)
    state = rules.state_after(project, "restore")
    if state == project.state:
        return project
    if project.state == "deleted":
        _check_leads(call.principal, "Restoring a deleted project")
        await _refuse_taken(unit, project.name, project.team_id)
    changed = await _save(unit, project, state=state)
    await _tell(unit, ProjectRestored(project=changed))
    return changed


async def move_project(message: MoveProject, unit: RegistryUnit, call: Envelope) -> Project:
    """Gives a project with its models and secrets to another team, in which the caller is admin or owner, too."""
    project = await visible_project(unit, call.principal, message.project_id)
    rules.state_after(project, "move")
    if message.team_id == project.team_id:
        return project
    await _check_leads_team(unit, call.principal, message.team_id)
    await _refuse_taken(unit, project.name, message.team_id)
    moved = await _save(unit, project, team_id=message.team_id)
    await unit.models.move(project.id, message.team_id)
    await unit.secrets.move(project.id, message.team_id)
    await _tell(unit, ProjectMoved(project=moved, from_team_id=project.team_id))
    return moved


async def get_project(message: GetProject, unit: RegistryUnit, call: Envelope) -> Project:
    """By id, also a deleted one; or by name."""
    return await visible_project(unit, call.principal, message.project_id)


async def list_projects(message: ListProjects, unit: RegistryUnit, call: Envelope) -> ProjectPage:
    """The team's projects, newest first."""
    states = rules.listed_states(message.state)
    return await unit.projects.page(call.principal.team_id, states, message.cursor, message.limit)


async def visible_project(unit: RegistryUnit, principal: Principal, id_or_name: str) -> Project:
    """The project that the principal names, within its team; an attempt sees only its own.

    Raises:
        NotFound: there is none, or none that it may know of.
    """
    project = await _find(unit, principal.team_id, id_or_name)
    if project is None or (principal.kind == "attempt" and project.id != principal.project_id):
        raise _no_project(id_or_name)
    return project


async def _restorable(unit: RegistryUnit, principal: Principal, id_or_name: str) -> Project:
    """As `visible_project`, but a name that nobody has now may also be that of a deleted project."""
    found = await _find(unit, principal.team_id, id_or_name)
    if found is None and rules.can_be_name(id_or_name):
        found = await unit.projects.deleted(id_or_name, principal.team_id)
    if found is None:
        raise _no_project(id_or_name)
    return found


async def _find(unit: RegistryUnit, team_id: str, id_or_name: str) -> Project | None:
    if is_id("project", id_or_name):
        return await unit.projects.by_id(id_or_name, team_id)
    return await unit.projects.named(id_or_name, team_id) if rules.can_be_name(id_or_name) else None


def _no_project(id_or_name: str) -> NotFound:
    detail = f"There is no project {id_or_name[:100]!r} in this team."
    return NotFound("project_not_found", detail, "See `nabla projects list`.")


async def _refuse_taken(unit: RegistryUnit, name: str, team_id: str) -> None:
    taken = await unit.projects.named(name, team_id)
    if taken:
        detail = f"The team has a project named {name} already."
        raise Conflict("project_exists", detail, "Use that one, or choose another name.", project_id=taken.id)


async def _check_leads_team(unit: RegistryUnit, principal: Principal, team_id: str) -> None:
    role = await unit.accounts.role(principal.id, team_id)
    if role is None:
        raise NotFound("team_not_found", "There is no such team among yours.", "See `nabla whoami`.")
    if role not in {"admin", "owner"}:
        detail = f"Moving a project needs the role admin in both teams; in the other one you are {role}."
        raise Forbidden("role_too_low", detail, "Ask an owner or admin of that team.")


def _check_leads(principal: Principal, what: str) -> None:
    if principal.role not in {"admin", "owner"}:
        detail = f"{what} needs the role admin in the team; this token has {principal.role}."
        raise Forbidden("role_too_low", detail, "Ask an owner or admin of the team.")


async def _save(unit: RegistryUnit, project: Project, **changes: Any) -> Project:
    values = {**changes, "updated_at": unit.now, "revision": project.revision + 1}
    changed = project.model_copy(update=values)
    await unit.projects.save(changed, project.revision)
    return changed


async def _tell(unit: RegistryUnit, event: ProjectEvent) -> None:
    project = event.project
    await unit.emit(
        event,
        team_id=project.team_id,
        object_id=project.id,
        project_id=project.id,
        revision=project.revision,
    )
