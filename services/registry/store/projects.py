"""Projects in the database."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select

from libs.common.clock import from_us, to_us
from libs.common.contracts.messages import Project, ProjectPage
from services.registry.store.tables import ProjectRow
from services.registry.store.unit import CatalogueUnit, table_of

PROJECTS = table_of(ProjectRow)


class Projects:
    """The repository of projects, within one unit of work."""

    def __init__(self, unit: CatalogueUnit) -> None:
        self._unit = unit

    async def add(self, project: Project) -> None:
        await self._unit.insert(ProjectRow, _values(project))

    async def by_id(self, project_id: str, team_id: str) -> Project | None:
        """Also a deleted one, as long as it can be restored."""
        query = select(PROJECTS).where(PROJECTS.c.id == project_id, PROJECTS.c.team_id == team_id)
        row = await self._unit.one(query)
        return _project(row) if row else None

    async def named(self, name: str, team_id: str) -> Project | None:
        """The one that has this name now; deleted ones have given theirs up."""
        query = select(PROJECTS).where(*_named(name, team_id), PROJECTS.c.state != "deleted")
        row = await self._unit.one(query)
        return _project(row) if row else None

    async def deleted(self, name: str, team_id: str) -> Project | None:
        """The newest deleted one that had this name."""
        query = select(PROJECTS).where(*_named(name, team_id), PROJECTS.c.state == "deleted")
        row = await self._unit.one(query.order_by(PROJECTS.c.updated_us.desc()))
        return _project(row) if row else None

    async def save(self, project: Project, revision: int) -> None:
        """Replaces the row, which must still be at `revision`.

        Raises:
            StaleRevision: it is not, or another has just taken the name.
        """
        values = _values(project)
        del values["id"], values["revision"]
        async with self._unit.unique("projects"):
            await self._unit.swap(ProjectRow, project.id, revision, values)

    async def page(self, team_id: str, states: Sequence[str], cursor: str, limit: int) -> ProjectPage:
        query = select(PROJECTS).where(PROJECTS.c.team_id == team_id, PROJECTS.c.state.in_(states))
        page = await self._unit.page(query, PROJECTS.c.id, cursor, limit)
        return ProjectPage(items=tuple(map(_project, page.rows)), next_cursor=page.next_cursor)

    async def deleted_before(self, moment: datetime, limit: int) -> list[Project]:
        query = select(PROJECTS).where(PROJECTS.c.state == "deleted", PROJECTS.c.updated_us < to_us(moment))
        rows = await self._unit.execute(query.order_by(PROJECTS.c.updated_us).limit(limit))
        return [_project(row) for row in rows]

    async def remove(self, project_id: str) -> None:
        await self._unit.execute(PROJECTS.delete().where(PROJECTS.c.id == project_id))


def _named(name: str, team_id: str) -> tuple[Any, ...]:
    return (PROJECTS.c.team_id == team_id, PROJECTS.c.name == name)


def _values(project: Project) -> dict[str, Any]:
    assert project.created_at
    assert project.updated_at
    return {
        "id": project.id,
        "team_id": project.team_id,
        "name": project.name,
        "description": project.description,
        "state": project.state,
        "created_by": project.created_by,
        "created_us": to_us(project.created_at),
        "updated_us": to_us(project.updated_at),
        "revision": project.revision,
    }


def _project(row: Any) -> Project:
    return Project(
        id=row.id,
        team_id=row.team_id,
        name=row.name,
        description=row.description,
        state=row.state,
        created_by=row.created_by,
        created_at=from_us(row.created_us),
        updated_at=from_us(row.updated_us),
        revision=row.revision,
    )
