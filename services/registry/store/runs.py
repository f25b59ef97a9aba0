"""Runs in a database of their own: tables, repository and unit of work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Index, Table, and_, func, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession

from libs.common.clock import from_us, to_us
from libs.common.contracts.messages import Point
from libs.common.store import Skeleton
from services.registry.domain.runs import OVER, Measured
from services.registry.store.unit import CatalogueUnit, audit_table, table_of


class Base(SQLModel, registry=registry()):
    """The metadata of the runs' database."""


class RunRow(Base, table=True):
    __tablename__ = "runs"
    __table_args__ = (
        Index("runs_to_check", "state", "checked_us"),
        Index("runs_of_project", "project_id", "id"),
    )

    # The id of its job.
    id: str = Field(primary_key=True, max_length=40)
    team_id: str = Field(max_length=40)
    project_id: str = Field(max_length=40)
    name: str = Field(max_length=250)
    # The job's.
    state: str = Field(max_length=16)
    attempt: int
    # Of the newest snapshot of the job that was applied; 0 for none.
    job_revision: int = Field(sa_type=BigInteger)
    created_us: int = Field(sa_type=BigInteger)
    ended_us: int | None = Field(default=None, sa_type=BigInteger)
    checked_us: int = Field(sa_type=BigInteger)
    revision: int = Field(sa_type=BigInteger)


class PointRow(Base, table=True):
    __tablename__ = "run_points"

    run_id: str = Field(primary_key=True, foreign_key="runs.id", max_length=40)
    name: str = Field(primary_key=True, max_length=250)
    attempt: int = Field(primary_key=True)
    step: int = Field(primary_key=True, sa_type=BigInteger)
    value: float
    at_us: int = Field(sa_type=BigInteger)


class MetricRow(Base, table=True):
    """The last value of each metric, so that a run is shown without reading its points."""

    __tablename__ = "run_metrics"

    run_id: str = Field(primary_key=True, foreign_key="runs.id", max_length=40)
    name: str = Field(primary_key=True, max_length=250)
    attempt: int
    step: int = Field(sa_type=BigInteger)
    value: float


class ParamRow(Base, table=True):
    __tablename__ = "run_params"

    run_id: str = Field(primary_key=True, foreign_key="runs.id", max_length=40)
    name: str = Field(primary_key=True, max_length=250)
    value: str = Field(max_length=1000)


class TagRow(Base, table=True):
    __tablename__ = "run_tags"

    run_id: str = Field(primary_key=True, foreign_key="runs.id", max_length=40)
    name: str = Field(primary_key=True, max_length=250)
    value: str = Field(max_length=1000)


AUDIT = audit_table(Base.metadata)
SKELETON = Skeleton(Base.metadata)
RUNS, POINTS, METRICS = table_of(RunRow), table_of(PointRow), table_of(MetricRow)
PARAMS, TAGS = table_of(ParamRow), table_of(TagRow)


@dataclass(frozen=True, slots=True)
class Tracked:
    """A run as it is stored; times in UTC."""

    id: str
    team_id: str
    project_id: str
    name: str
    state: str
    attempt: int
    job_revision: int
    created_at: datetime
    ended_at: datetime | None
    checked_at: datetime
    revision: int


class Runs:
    """The repository of runs, within one unit of work."""

    def __init__(self, unit: CatalogueUnit) -> None:
        self._unit = unit

    async def get(self, job_id: str) -> Tracked | None:
        row = await self._unit.one(select(RUNS).where(RUNS.c.id == job_id))
        return _tracked(row) if row else None

    async def add(self, run: Tracked) -> None:
        await self._unit.insert(RunRow, {"id": run.id, "revision": run.revision} | _values(run))

    async def save(self, run: Tracked) -> Tracked:
        """Saves the run with its next revision.

        Raises:
            StaleRevision: somebody else saved first.
        """
        await self._unit.swap(RunRow, run.id, run.revision, _values(run))
        return replace(run, revision=run.revision + 1)

    async def log_points(self, run_id: str, attempt: int, points: Sequence[Point]) -> None:
        """Stores points that differ in name or step; those there already are replaced."""
        rows = [
            {
                "run_id": run_id,
                "name": point.name,
                "attempt": attempt,
                "step": point.step,
                "value": point.value,
                "at_us": to_us(point.at or self._unit.now),
            }
            for point in points
        ]
        await self._upsert(POINTS, rows, ("run_id", "name", "attempt", "step"))

    async def log_last(self, run_id: str, attempt: int, last: Mapping[str, Point]) -> None:
        """Keeps the last value of each metric, unless a later step or attempt is there."""
        rows = [
            {"run_id": run_id, "name": name, "attempt": attempt, "step": point.step, "value": point.value}
            for name, point in last.items()
        ]
        await self._upsert(METRICS, rows, ("run_id", "name"), _not_older)

    async def log_texts(self, table: Table, run_id: str, texts: Mapping[str, str]) -> None:
        """Keeps params or tags; the last value of a name counts."""
        rows = [{"run_id": run_id, "name": name, "value": value} for name, value in texts.items()]
        await self._upsert(table, rows, ("run_id", "name"))

    async def name_count(self, table: Table, run_id: str) -> int:
        query = select(func.count().label("names")).select_from(table).where(table.c.run_id == run_id)
        return int((await self._unit.one(query)).names)

    async def named_values(self, table: Table, run_id: str) -> dict[str, Any]:
        """Name -> value of a run's metrics, params or tags."""
        query = select(table.c.name, table.c.value).where(table.c.run_id == run_id).order_by(table.c.name)
        return {row.name: row.value for row in await self._unit.execute(query)}

    async def points(self, run_id: str, name: str) -> dict[str, list[Measured]]:
        """Each metric's points, or those of one; ordered by attempt, then step."""
        columns = (POINTS.c.name, POINTS.c.attempt, POINTS.c.step, POINTS.c.value, POINTS.c.at_us)
        query = select(*columns).where(POINTS.c.run_id == run_id)
        if name:
            query = query.where(POINTS.c.name == name)
        rows = await self._unit.execute(query.order_by(POINTS.c.name, POINTS.c.attempt, POINTS.c.step))
        return {
            metric: [Measured._make(row[1:]) for row in group] for metric, group in groupby(rows, key=itemgetter(0))
        }

    async def unchecked(self, before: datetime, limit: int) -> list[Tracked]:
        """Runs that are not over and were not looked at since, the longest unseen first."""
        query = select(RUNS).where(RUNS.c.state.not_in(OVER), RUNS.c.checked_us < to_us(before))
        return [_tracked(row) for row in await self._unit.execute(query.order_by(RUNS.c.checked_us).limit(limit))]

    async def checked(self, run_ids: Iterable[str], at: datetime) -> None:
        await self._unit.execute(RUNS.update().where(RUNS.c.id.in_(list(run_ids))).values(checked_us=to_us(at)))

    async def move(self, project_id: str, team_id: str) -> None:
        moved = RUNS.update().where(RUNS.c.project_id == project_id)
        await self._unit.execute(moved.values(team_id=team_id, revision=RUNS.c.revision + 1))

    async def remove_of(self, project_id: str) -> None:
        of_project = select(RUNS.c.id).where(RUNS.c.project_id == project_id)
        for table in (POINTS, METRICS, PARAMS, TAGS):
            await self._unit.execute(table.delete().where(table.c.run_id.in_(of_project)))
        await self._unit.execute(RUNS.delete().where(RUNS.c.project_id == project_id))

    async def _upsert(self, table: Table, rows: list[dict[str, Any]], keys: tuple[str, ...], where: Any = None) -> None:
        if not rows:
            return
        connection = await self._unit.session.connection()
        insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        statement = insert(table)
        others = {name: statement.excluded[name] for name in table.c.keys() if name not in keys}  # noqa: SIM118
        condition = where(statement.excluded) if where else None
        statement = statement.on_conflict_do_update(index_elements=keys, set_=others, where=condition)
        await connection.execute(statement, rows)


class RunsUnit(CatalogueUnit):
    """One transaction of the runs' database."""

    audit_rows = AUDIT

    def __init__(self, session: AsyncSession, skeleton: Skeleton, source: str, now: datetime) -> None:
        super().__init__(session, skeleton, source, now)
        self.runs = Runs(self)


def _not_older(new: Any) -> ColumnElement[bool]:
    same = and_(METRICS.c.attempt == new.attempt, METRICS.c.step <= new.step)
    return or_(METRICS.c.attempt < new.attempt, same)


def _values(run: Tracked) -> dict[str, Any]:
    return {
        "team_id": run.team_id,
        "project_id": run.project_id,
        "name": run.name,
        "state": run.state,
        "attempt": run.attempt,
        "job_revision": run.job_revision,
        "created_us": to_us(run.created_at),
        "ended_us": to_us(run.ended_at) if run.ended_at else None,
        "checked_us": to_us(run.checked_at),
    }


def _tracked(row: Any) -> Tracked:
    return Tracked(
        id=row.id,
        team_id=row.team_id,
        project_id=row.project_id,
        name=row.name,
        state=row.state,
        attempt=row.attempt,
        job_revision=row.job_revision,
        created_at=from_us(row.created_us),
        ended_at=from_us(row.ended_us) if row.ended_us is not None else None,
        checked_at=from_us(row.checked_us),
        revision=row.revision,
    )
