"""The unit of work that loads and saves cases, and the store that tells what changed.

Rows are read and written as plain columns, never as mapped objects: a batch of messages shares one session, and
nothing of a refused message may linger in it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sqlalchemy import ColumnElement, Row, Table, insert, select, update

from libs.common.clock import Clock, to_us, utc_now
from libs.common.contracts.messages import Node, Principal, StartExecution, StopExecution
from libs.common.store import Store, UnitOfWork
from services.scheduler.domain.machine_types import MachineTypes
from services.scheduler.domain.model import Attempt, Case, Experiment, Job
from services.scheduler.domain.policy import Demand, Policy
from services.scheduler.domain.snapshots import event_of
from services.scheduler.ports import MachineTypeSource
from services.scheduler.rows import (
    CASES,
    CLOSED,
    DEMANDS,
    PLACES,
    attempt_columns,
    changing_columns,
    identity_columns,
    read_attempt,
    read_case,
    read_demand,
    step_of,
    timeline_entry,
)
from services.scheduler.tables import (
    ATTEMPTS,
    EXPERIMENTS,
    INVENTORIES,
    JOBS,
    PROJECTS,
    SKELETON,
    TIMELINE,
    Base,
    JobRow,
)

__all__ = ["GONE", "UNHEARD", "Base", "Changes", "Inventory", "Place", "SchedulerStore", "SchedulerUnit"]

# States of a project that the registry does not have: nobody has told of it yet; its team has none of that id.
UNHEARD, GONE = "unheard", "gone"
# Who moves jobs unless somebody else is named.
ACTOR = "scheduler"


@dataclass(frozen=True, slots=True)
class Inventory:
    """What an executor has, as it said when it was last heard, by our clock."""

    executor: str
    nodes: tuple[Node, ...]
    detail: str
    heard_us: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a live job's newest attempt is, without its template."""

    job_id: str
    state: str
    detail: str
    node_ids: tuple[str, ...]
    forgotten: bool


class SchedulerUnit(UnitOfWork):
    """One transaction. Jobs written in it are in `touched_jobs`, for whoever keeps a picture of the queue.

    Attributes:
        policy: that picture, to look at; it may be a moment behind.
    """

    policy: Policy
    machine_types: MachineTypeSource

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.touched_jobs: set[str] = set()
        self.touched_nodes = False
        self.touched_projects: set[str] = set()

    @property
    def now_us(self) -> int:
        return to_us(self.now)

    async def find(self, job_id: str, team_id: str | None = None) -> Case | None:
        """A job with its newest attempt.

        Args:
            team_id: only if it belongs to this team; None for the platform's own purposes.
        """
        wanted = [JOBS.c.id == job_id] + ([] if team_id is None else [JOBS.c.team_id == team_id])
        return next(iter(await self.cases(*wanted)), None)

    async def cases(self, *wanted: ColumnElement[bool], order: Any = None, limit: int | None = None) -> list[Case]:
        query = CASES.where(*wanted).order_by(JOBS.c.id if order is None else order).limit(limit)
        return [read_case(row) for row in (await self.execute(query)).all()]

    async def places(self, state: str, limit: int) -> list[Place]:
        """Where the jobs in this state are, those first that were looked at longest ago."""
        query = PLACES.where(JOBS.c.ended_us.is_(None), JOBS.c.state == state).order_by(JOBS.c.checked_us)
        rows = (await self.execute(query.limit(limit))).all()
        return [Place(**(dict(row._mapping) | {"node_ids": tuple(json.loads(row.node_ids))})) for row in rows]

    async def add(self, case: Case, first_detail: str) -> Case:
        """Stores a new job, already in the queue. Its timeline begins with the submission."""
        job = replace(case.job, revision=1)
        row = {
            "id": job.id,
            **identity_columns(job),
            **changing_columns(job),
            "attempt_id": None,
            "checked_us": 0,
            "revision": 1,
        }
        await self.execute(insert(JOBS), row)
        first = replace(job, state="submitted", detail=first_detail, revision=0)
        submitted = timeline_entry(first, self.now_us, case.actor or ACTOR, "submitted")
        await self.execute(insert(TIMELINE), [submitted, timeline_entry(job, self.now_us, ACTOR, case.cause)])
        added = replace(case, job=job)
        await self._announce(added)
        return added

    async def save(self, before: Case, after: Case) -> Case:
        """Saves what changed, with its event and commands; nothing when nothing did.

        Raises:
            StaleRevision: somebody else saved first.
        """
        if (before.job, before.attempt) != (after.job, after.attempt):
            after = await self._write(before, after)
        await self.send(after)
        return after

    async def send(self, case: Case) -> None:
        """Emits the case's commands."""
        for command in case.commands:
            await self._emit_for(case, command)

    async def _write(self, before: Case, after: Case) -> Case:
        job, attempt = replace(after.job, revision=before.job.revision + 1), after.attempt
        values = changing_columns(job) | {"attempt_id": attempt.id if attempt else None}
        await self.swap(JobRow, job.id, before.job.revision, values)
        if attempt and attempt != before.attempt:
            await self._write_attempt(job, attempt, is_new=before.attempt is None or before.attempt.id != attempt.id)
        if step_of(before) != step_of(after):
            await self.execute(insert(TIMELINE), timeline_entry(job, self.now_us, after.actor or ACTOR, after.cause))
        written = replace(after, job=job)
        await self._announce(written)
        return written

    async def _write_attempt(self, job: Job, attempt: Attempt, *, is_new: bool) -> None:
        values = attempt_columns(attempt) | {"job_id": job.id, "checked_us": self.now_us}
        if is_new:
            await self.execute(insert(ATTEMPTS), values)
        else:
            await self.execute(update(ATTEMPTS).where(ATTEMPTS.c.id == attempt.id).values(**values))

    async def _announce(self, case: Case) -> None:
        job = case.job
        self.touched_jobs.add(job.id)
        await self.emit(
            event_of(case),
            team_id=job.team_id,
            object_id=job.id,
            project_id=job.project_id,
            revision=job.revision,
            attempt=job.attempt_count,
        )

    async def _emit_for(self, case: Case, command: StartExecution | StopExecution) -> None:
        job = case.job
        await self.emit(
            command,
            team_id=job.team_id,
            object_id=command.attempt_id,
            project_id=job.project_id,
            attempt=job.attempt_count,
            sender=Principal(kind="service", id="scheduler", team_id=job.team_id),
        )

    async def attempts(self, job_id: str) -> list[Attempt]:
        query = select(ATTEMPTS).where(ATTEMPTS.c.job_id == job_id).order_by(ATTEMPTS.c.number)
        return [read_attempt(row, "") for row in (await self.execute(query)).all()]

    async def timeline(self, job_id: str) -> Sequence[Row[Any]]:
        query = select(TIMELINE).where(TIMELINE.c.job_id == job_id).order_by(TIMELINE.c.revision)
        return (await self.execute(query)).all()

    async def newest_cause(self, job_id: str) -> str:
        """Why the job came to be as it is, in one word."""
        query = select(TIMELINE.c.cause).where(TIMELINE.c.job_id == job_id).order_by(TIMELINE.c.revision.desc())
        return (await self.execute(query.limit(1))).scalar() or ""

    async def demands(self, wanted: ColumnElement[bool], limit: int | None = None) -> dict[str, Demand | None]:
        """What each of these jobs asks of the policy, in the order of ids; None for one that asks nothing."""
        rows = (await self.execute(DEMANDS.where(wanted).order_by(JOBS.c.id).limit(limit))).all()
        return {row.id: read_demand(row, self.now_us) for row in rows}

    async def mark_checked(self, table: Table, ids: Collection[str]) -> None:
        """Puts rows at the end of the line of those to be looked at again."""
        if ids:
            await self.execute(update(table).where(table.c.id.in_(ids)).values(checked_us=self.now_us))

    async def add_experiment(self, experiment: Experiment) -> None:
        await self.execute(
            insert(EXPERIMENTS).values({item.name: getattr(experiment, item.name) for item in fields(experiment)})
        )

    async def experiments(self, *wanted: ColumnElement[bool], limit: int | None = None) -> list[Experiment]:
        query = select(EXPERIMENTS).where(*wanted).order_by(EXPERIMENTS.c.id.desc()).limit(limit)
        return [Experiment(**row._mapping) for row in (await self.execute(query)).all()]

    async def project(self, project_id: str) -> Row[Any] | None:
        query = select(PROJECTS).where(PROJECTS.c.id == project_id)
        return (await self.execute(query)).first()

    async def keep_project(self, project_id: str, team_id: str, state: str, revision: int) -> None:
        """Takes in a snapshot, unless a newer one is known."""
        known = await self.project(project_id)
        if known is None or revision > known.revision:
            await self._put_project(project_id, team_id, state, revision, self.now_us, is_new=known is None)

    async def await_project(self, project_id: str, team_id: str) -> None:
        """Lets the registry be asked next whether this team has such a project."""
        known = await self.project(project_id)
        revision = known.revision if known else 0
        await self._put_project(project_id, team_id, UNHEARD, revision, 0, is_new=known is None)

    async def _put_project(
        self, project_id: str, team_id: str, state: str, revision: int, checked_us: int, *, is_new: bool
    ) -> None:
        values = {"team_id": team_id, "state": state, "revision": revision, "checked_us": checked_us}
        if is_new:
            await self.execute(insert(PROJECTS), values | {"id": project_id})
        else:
            await self.execute(update(PROJECTS).where(PROJECTS.c.id == project_id).values(**values))
        self.touched_projects.add(project_id)

    async def projects_unchecked(self, before_us: int, limit: int) -> Sequence[Row[Any]]:
        """Those of which nothing was heard since, longest first."""
        due = select(PROJECTS).where(PROJECTS.c.checked_us < before_us).order_by(PROJECTS.c.checked_us)
        return (await self.execute(due.limit(limit))).all()

    async def correct_project(self, asked: Row[Any], state: str, revision: int) -> None:
        """Takes in an answer, whatever revision it has, unless something was heard while it was asked for."""
        same = (PROJECTS.c[name] == getattr(asked, name) for name in ("id", "team_id", "revision"))
        values = {"state": state, "revision": revision, "checked_us": self.now_us}
        changed = await self.execute(update(PROJECTS).where(*same).values(**values))
        if changed.rowcount and state != asked.state:
            self.touched_projects.add(asked.id)

    async def closed_projects(self, project_ids: Collection[str]) -> set[str]:
        """Those of them in which nothing may run."""
        query = select(PROJECTS.c.id).where(PROJECTS.c.id.in_(project_ids), PROJECTS.c.state.in_(CLOSED))
        return set((await self.execute(query)).scalars())

    async def queued_in(self, project_id: str) -> list[str]:
        """The jobs that wait in this project."""
        query = select(JOBS.c.id).where(JOBS.c.project_id == project_id, JOBS.c.state == "queued")
        return list((await self.execute(query)).scalars())

    async def inventories(self) -> list[Inventory]:
        rows = (await self.execute(select(INVENTORIES).order_by(INVENTORIES.c.executor))).all()
        return [
            Inventory(
                row.executor,
                tuple(Node.model_validate(node) for node in json.loads(row.nodes)),
                row.detail,
                row.heard_us,
            )
            for row in rows
        ]

    async def keep_inventory(
        self, executor: str, nodes: Sequence[Node], detail: str, sent_us: int | None = None
    ) -> None:
        """Takes in an executor's word, unless it said something later before.

        Args:
            sent_us: by the executor's own clock, only ever compared with itself; None for an answer to a
                question, which is always the newest.
        """
        mine = INVENTORIES.c.executor == executor
        known = (await self.execute(select(INVENTORIES.c.sent_us).where(mine))).scalar()
        if known is not None and sent_us is not None and sent_us <= known:
            return
        values = {
            "executor": executor,
            "nodes": json.dumps([node.model_dump(mode="json") for node in nodes]),
            "detail": detail,
            "sent_us": known or 0 if sent_us is None else sent_us,
            "heard_us": self.now_us,
        }
        await self.execute(
            insert(INVENTORIES).values(**values) if known is None else update(INVENTORIES).where(mine).values(**values)
        )
        self.touched_nodes = True


@dataclass
class Changes:
    """What was committed since somebody last looked."""

    jobs: set[str] = field(default_factory=set)
    nodes: bool = False
    projects: set[str] = field(default_factory=set)
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, jobs: Collection[str], *, nodes: bool = False, projects: Collection[str] = ()) -> None:
        self.jobs.update(jobs)
        self.nodes = self.nodes or nodes
        self.projects.update(projects)
        if jobs or nodes or projects:
            self.happened.set()

    def take(self) -> tuple[set[str], bool, set[str]]:
        taken = self.jobs, self.nodes, self.projects
        self.jobs, self.nodes, self.projects = set(), False, set()
        self.happened.clear()
        return taken


class NoMachineTypes:
    """An installation that names no machine types of its own."""

    def types(self) -> MachineTypes | None:
        return None


class SchedulerStore(Store[SchedulerUnit]):
    """The database, which tells what each commit changed, and the picture of the queue that is kept beside it.

    Attributes:
        policy: the live queue in memory, kept in step by the placing loop; others only look at it.
    """

    def __init__(self, url: str, clock: Clock = utc_now, machine_types: MachineTypeSource | None = None) -> None:
        super().__init__(url, SchedulerUnit, SKELETON, "scheduler", clock)
        self.changes = Changes()
        self.policy = Policy()
        self._machine_types = machine_types or NoMachineTypes()

    @asynccontextmanager
    async def view(self) -> AsyncIterator[SchedulerUnit]:
        async with super().view() as unit:
            yield self._equipped(unit)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[SchedulerUnit]:
        async with super().begin() as unit:
            yield self._equipped(unit)
        # After the commit: whoever is told earlier would read what was before.
        self.changes.note(unit.touched_jobs, nodes=unit.touched_nodes, projects=unit.touched_projects)

    def _equipped(self, unit: SchedulerUnit) -> SchedulerUnit:
        unit.policy, unit.machine_types = self.policy, self._machine_types
        return unit
