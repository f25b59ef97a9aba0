"""Models and their versions in the database. A version is written once and never changed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Select, and_, select

from libs.common.clock import from_us, to_us
from libs.common.contracts.messages import Model, ModelPage, ModelVersion
from services.registry.store.tables import ModelRow, ModelVersionRow, ProjectRow
from services.registry.store.unit import CatalogueUnit, table_of

MODELS, VERSIONS, PROJECTS = table_of(ModelRow), table_of(ModelVersionRow), table_of(ProjectRow)


class Models:
    """The repository of models, within one unit of work. Models of a deleted project are not found."""

    def __init__(self, unit: CatalogueUnit) -> None:
        self._unit = unit

    async def add(self, model: Model) -> None:
        assert model.created_at
        values = {
            "id": model.id,
            "team_id": model.team_id,
            "project_id": model.project_id,
            "name": model.name,
            "description": model.description,
            "latest_version": model.latest_version,
            "created_us": to_us(model.created_at),
            "revision": model.revision,
        }
        await self._unit.insert(ModelRow, values)

    async def by_id(self, model_id: str, team_id: str) -> Model | None:
        row = await self._unit.one(_visible(team_id).where(MODELS.c.id == model_id))
        return _model(row) if row else None

    async def named(self, name: str, team_id: str, project_id: str = "") -> list[Model]:
        """The models with this name: at most one in a project, perhaps more in a team; two are enough to know."""
        query = _visible(team_id).where(MODELS.c.name == name)
        if project_id:
            query = query.where(MODELS.c.project_id == project_id)
        return [_model(row) for row in await self._unit.execute(query.limit(2))]

    async def page(self, team_id: str, project_id: str, cursor: str, limit: int) -> ModelPage:
        """Models with their newest versions."""
        query = _visible(team_id)
        if project_id:
            query = query.where(MODELS.c.project_id == project_id)
        page = await self._unit.page(query, MODELS.c.id, cursor, limit)
        models = [_model(row) for row in page.rows]
        newest = await self._newest(models)
        items = tuple(model.model_copy(update={"latest": newest[model.id]}) for model in models)
        return ModelPage(items=items, next_cursor=page.next_cursor)

    async def _newest(self, models: Iterable[Model]) -> dict[str, ModelVersion]:
        query = _versions().where(
            MODELS.c.id.in_([model.id for model in models]), VERSIONS.c.version == MODELS.c.latest_version
        )
        return {row.model_id: _version(row) for row in await self._unit.execute(query)}

    async def set_latest(self, model: Model, version: int) -> None:
        """Raises StaleRevision when another version came first."""
        await self._unit.swap(ModelRow, model.id, model.revision, {"latest_version": version})

    async def add_version(self, version: ModelVersion) -> None:
        assert version.created_at
        values = {
            "id": version.id,
            "model_id": version.model_id,
            "version": version.version,
            "framework": version.framework,
            "description": version.description,
            "fileset_id": version.fileset_id,
            "size_bytes": version.size_bytes,
            "digest": version.digest,
            "job_id": version.job_id,
            "metrics": json.dumps(version.metrics),
            "created_by": version.created_by,
            "created_us": to_us(version.created_at),
        }
        await self._unit.insert(ModelVersionRow, values)

    async def version(self, model_id: str, number: int) -> ModelVersion | None:
        query = _versions().where(VERSIONS.c.model_id == model_id, VERSIONS.c.version == number)
        row = await self._unit.one(query)
        return _version(row) if row else None

    async def version_of(self, model_id: str, fileset_id: str) -> ModelVersion | None:
        query = _versions().where(VERSIONS.c.model_id == model_id, VERSIONS.c.fileset_id == fileset_id)
        row = await self._unit.one(query)
        return _version(row) if row else None

    async def newest_versions(self, model_id: str, limit: int) -> tuple[ModelVersion, ...]:
        query = _versions().where(VERSIONS.c.model_id == model_id)
        rows = await self._unit.execute(query.order_by(VERSIONS.c.version.desc()).limit(limit))
        return tuple(map(_version, rows))

    async def move(self, project_id: str, team_id: str) -> None:
        """Takes the models of a project along to its new team."""
        moved = MODELS.update().where(MODELS.c.project_id == project_id)
        await self._unit.execute(moved.values(team_id=team_id, revision=MODELS.c.revision + 1))

    async def remove_of(self, project_id: str) -> None:
        of_project = select(MODELS.c.id).where(MODELS.c.project_id == project_id)
        await self._unit.execute(VERSIONS.delete().where(VERSIONS.c.model_id.in_(of_project)))
        await self._unit.execute(MODELS.delete().where(MODELS.c.project_id == project_id))


def _visible(team_id: str) -> Select[Any]:
    living = and_(PROJECTS.c.id == MODELS.c.project_id, PROJECTS.c.state != "deleted")
    return select(MODELS).join(PROJECTS, living).where(MODELS.c.team_id == team_id)


def _versions() -> Select[Any]:
    named = select(VERSIONS, MODELS.c.name.label("model_name"), MODELS.c.project_id)
    return named.join(MODELS, MODELS.c.id == VERSIONS.c.model_id)


def _model(row: Any) -> Model:
    return Model(
        id=row.id,
        team_id=row.team_id,
        project_id=row.project_id,
        name=row.name,
        description=row.description,
        created_at=from_us(row.created_us),
        revision=row.revision,
        latest_version=row.latest_version,
    )


def _version(row: Any) -> ModelVersion:
    return ModelVersion(
        id=row.id,
        model_id=row.model_id,
        model_name=row.model_name,
        version=row.version,
        framework=row.framework,
        description=row.description,
        fileset_id=row.fileset_id,
        size_bytes=row.size_bytes,
        digest=row.digest,
        job_id=row.job_id,
        metrics=json.loads(row.metrics),
        created_by=row.created_by,
        created_at=from_us(row.created_us),
        project_id=row.project_id,
    )
