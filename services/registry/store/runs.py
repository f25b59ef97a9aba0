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
from libs.common.contracts.messages import Point, Series
from libs.common.store import Skeleton
from services.registry.domain.runs import OVER, Measured, Stretch, even_places
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
MEASURED = (POINTS.c.attempt, POINTS.c.step, POINTS.c.value, POINTS.c.at_us)
NAMES_A_QUERY = 500


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

    async def outline(self, run_id: str, name: str, prefix: str) -> dict[str, list[Stretch]]:
        """Name -> what each attempt has of that series, in order; of one name, or of those that begin with a prefix."""
        counted = (func.count().label("points"), func.min(POINTS.c.step).label("first"))
        query = select(POINTS.c.name, POINTS.c.attempt, *counted).where(POINTS.c.run_id == run_id)
        if name:
            query = query.where(POINTS.c.name == name)
        if prefix:
            query = query.where(POINTS.c.name.startswith(prefix, autoescape=True))
        rows = await self._unit.execute(
            query.group_by(POINTS.c.name, POINTS.c.attempt).order_by(POINTS.c.name, POINTS.c.attempt)
        )
        return {metric: [Stretch._make(row[1:]) for row in group] for metric, group in groupby(rows, key=itemgetter(0))}

    async def points(self, run_id: str, names: Sequence[str]) -> dict[str, list[Measured]]:
        """Each of these metrics' points, ordered by attempt, then step."""
        found: dict[str, list[Measured]] = {}
        for start in range(0, len(names), NAMES_A_QUERY):
            some = POINTS.c.name.in_(names[start : start + NAMES_A_QUERY])
            query = select(POINTS.c.name, *MEASURED).where(POINTS.c.run_id == run_id, some)
            rows = await self._unit.execute(query.order_by(POINTS.c.name, POINTS.c.attempt, POINTS.c.step))
            for metric, group in groupby(rows, key=itemgetter(0)):
                found[metric] = [Measured._make(row[1:]) for row in group]
        return found

    async def newest_points(self, run_id: str, name: str, count: int) -> list[Measured]:
        """The series' last points, ordered by attempt, then step."""
        query = select(*MEASURED).where(POINTS.c.run_id == run_id, POINTS.c.name == name)
        newest = query.order_by(POINTS.c.attempt.desc(), POINTS.c.step.desc()).limit(count)
        return [Measured._make(row) for row in await self._unit.execute(newest)][::-1]

    async def thinned_series(self, run_id: str, name: str, bounds: Mapping[int, int], most: int) -> Series:
        """A long series, spliced and thinned where it lies: no more than the points that are shown come over.

        Args:
            bounds: attempt -> the last step at which its points count.
        """
        counts = or_(*(and_(POINTS.c.attempt == attempt, POINTS.c.step <= bound) for attempt, bound in bounds.items()))
        here = (POINTS.c.run_id == run_id, POINTS.c.name == name, counts)
        amounts = (func.count().label("points"), func.min(POINTS.c.value), func.max(POINTS.c.value))
        count, lowest, highest = await self._unit.one(select(*amounts).where(*here))
        in_order = (POINTS.c.attempt, POINTS.c.step)
        place = (func.row_number().over(order_by=in_order) - 1).label("place")
        placed = select(*MEASURED, place).where(*here).subquery()
        wanted = placed.c.place.in_(even_places(count, most - 2))
        chosen = {Measured._make(row[:4]) for row in await self._unit.execute(select(placed).where(wanted))}
        for extreme in (lowest, highest):
            at_extreme = select(*MEASURED).where(*here, POINTS.c.value == extreme).order_by(*in_order).limit(1)
            chosen.add(Measured._make(await self._unit.one(at_extreme)))
        shown = sorted(chosen)
        return Series(
            name=name,
            points=tuple(Point(value=each.value, step=each.step, at=from_us(each.at_us)) for each in shown),
            min=lowest,
            max=highest,
            last=shown[-1].value,
            point_count=count,
        )

    async def thin(self, run_id: str, attempt: int, prefix: str, before_step: int, every: int) -> None:
        """Removes points before a step, but for every so manieth step's."""
        names = select(METRICS.c.name).where(
            METRICS.c.run_id == run_id, METRICS.c.name.startswith(prefix, autoescape=True)
        )
        old = (POINTS.c.attempt == attempt, POINTS.c.step < before_step, POINTS.c.step % every != 0)
        await self._unit.execute(POINTS.delete().where(POINTS.c.run_id == run_id, POINTS.c.name.in_(names), *old))

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
