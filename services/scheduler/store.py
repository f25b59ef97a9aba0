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
from libs.common.contracts.messages import Execution, JobTemplate, Node, Principal, StartExecution, StopExecution
from libs.common.store import Store, UnitOfWork
from services.scheduler.domain.model import Attempt, Case, Experiment, Job, Member
from services.scheduler.domain.policy import Demand, Shape, shape_of
from services.scheduler.domain.snapshots import event_of
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

_JOB_FIELDS = tuple(item.name for item in fields(Job))
_ATTEMPT_FIELDS = tuple(item.name for item in fields(Attempt))
_NEWEST = "newest_"
# States of a project that the registry does not have: nobody has told of it yet; its team has none of that id.
UNHEARD, GONE = "unheard", "gone"
_CASES = select(
    *(JOBS.c[name] for name in _JOB_FIELDS),
    *(ATTEMPTS.c[name].label(_NEWEST + name) for name in _ATTEMPT_FIELDS),
).outerjoin_from(JOBS, ATTEMPTS, JOBS.c.attempt_id == ATTEMPTS.c.id)
_PLACES = select(
    JOBS.c.id.label("job_id"),
    JOBS.c.state,
    JOBS.c.detail,
    *(ATTEMPTS.c[name] for name in ("node_id", "members", "forgotten")),
).join_from(JOBS, ATTEMPTS, JOBS.c.attempt_id == ATTEMPTS.c.id)
_DEMANDS = select(
    JOBS.c.id,
    JOBS.c.team_id,
    JOBS.c.milli_gpus,
    JOBS.c.milli_cpus,
    JOBS.c.memory_bytes,
    JOBS.c.state,
    JOBS.c.created_us,
    JOBS.c.ready_us,
    ATTEMPTS.c.node_id,
    ATTEMPTS.c.ended_us.label("attempt_ended_us"),
).outerjoin_from(JOBS, ATTEMPTS, JOBS.c.attempt_id == ATTEMPTS.c.id)


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
    node_ids: frozenset[str]
    forgotten: bool


class SchedulerUnit(UnitOfWork):
    """One transaction. Jobs written in it are in `touched_jobs`, for whoever keeps a picture of the queue."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.touched_jobs: set[str] = set()
        self.touched_nodes = False

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
        query = _CASES.where(*wanted).order_by(JOBS.c.id if order is None else order).limit(limit)
        return [_case(row) for row in (await self.execute(query)).all()]

    async def places(self, state: str, limit: int) -> list[Place]:
        """Where the jobs in this state are, those first that were looked at longest ago."""
        query = _PLACES.where(JOBS.c.ended_us.is_(None), JOBS.c.state == state).order_by(JOBS.c.checked_us)
        rows = (await self.execute(query.limit(limit))).all()
        return [Place(row.job_id, row.state, row.detail, _node_ids(row), row.forgotten) for row in rows]

    async def add(self, case: Case, first_detail: str) -> Case:
        """Stores a new job, already in the queue. Its timeline begins with the submission."""
        job = replace(case.job, revision=1)
        row = {"id": job.id, **_identity(job), **_changing(job), "attempt_id": None, "checked_us": 0, "revision": 1}
        await self.execute(insert(JOBS), row)
        submitted = _entry(replace(job, state="submitted", detail=first_detail, revision=0), self.now_us)
        await self.execute(insert(TIMELINE), [submitted, _entry(job, self.now_us)])
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
        values = _changing(job) | {"attempt_id": attempt.id if attempt else None}
        await self.swap(JobRow, job.id, before.job.revision, values)
        if attempt and attempt != before.attempt:
            await self._write_attempt(job, attempt, is_new=before.attempt is None or before.attempt.id != attempt.id)
        if (job.state, job.desired_state) != (before.job.state, before.job.desired_state):
            await self.execute(insert(TIMELINE), _entry(job, self.now_us))
        written = replace(after, job=job)
        await self._announce(written)
        return written

    async def _write_attempt(self, job: Job, attempt: Attempt, *, is_new: bool) -> None:
        values = _columns(attempt) | {"job_id": job.id, "checked_us": self.now_us}
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
        return [_attempt(row, "") for row in (await self.execute(query)).all()]

    async def timeline(self, job_id: str) -> Sequence[Row[Any]]:
        query = select(TIMELINE).where(TIMELINE.c.job_id == job_id).order_by(TIMELINE.c.revision)
        return (await self.execute(query)).all()

    async def demands(self, wanted: ColumnElement[bool], limit: int | None = None) -> dict[str, Demand | None]:
        """What each of these jobs asks of the policy, in the order of ids; None for one that asks nothing."""
        rows = (await self.execute(_DEMANDS.where(wanted).order_by(JOBS.c.id).limit(limit))).all()
        return {row.id: _demand(row, self.now_us) for row in rows}

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

    async def projects_unchecked(self, before_us: int, limit: int) -> Sequence[Row[Any]]:
        """Those of which nothing was heard since, longest first."""
        due = select(PROJECTS).where(PROJECTS.c.checked_us < before_us).order_by(PROJECTS.c.checked_us)
        return (await self.execute(due.limit(limit))).all()

    async def correct_project(self, asked: Row[Any], state: str, revision: int) -> None:
        """Takes in an answer, whatever revision it has, unless something was heard while it was asked for."""
        same = (PROJECTS.c[name] == getattr(asked, name) for name in ("id", "team_id", "revision"))
        values = {"state": state, "revision": revision, "checked_us": self.now_us}
        await self.execute(update(PROJECTS).where(*same).values(**values))

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
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, jobs: Collection[str], *, nodes: bool = False) -> None:
        self.jobs.update(jobs)
        self.nodes = self.nodes or nodes
        if jobs or nodes:
            self.happened.set()

    def take(self) -> tuple[set[str], bool]:
        taken = self.jobs, self.nodes
        self.jobs, self.nodes = set(), False
        self.happened.clear()
        return taken


class SchedulerStore(Store[SchedulerUnit]):
    """The database, which tells what each commit changed."""

    def __init__(self, url: str, clock: Clock = utc_now) -> None:
        super().__init__(url, SchedulerUnit, SKELETON, "scheduler", clock)
        self.changes = Changes()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[SchedulerUnit]:
        async with super().begin() as unit:
            yield unit
        # After the commit: whoever is told earlier would read what was before.
        self.changes.note(unit.touched_jobs, nodes=unit.touched_nodes)


def _identity(job: Job) -> dict[str, Any]:
    """The columns that never change."""
    resources = job.template.resources
    shape = shape_of(resources.cpu_count, resources.memory_bytes, resources.gpu_count)
    return {
        "team_id": job.team_id,
        "project_id": job.project_id,
        "experiment_id": job.experiment_id,
        "kind": job.template.kind,
        "template": job.template.model_dump_json(exclude_defaults=True),
        **shape._asdict(),
        "created_by": job.created_by,
        "created_us": job.created_us,
        "traceparent": job.traceparent,
    }


def _changing(job: Job) -> dict[str, Any]:
    return {
        "state": job.state,
        "detail": job.detail,
        "desired_state": job.desired_state,
        "queued_us": job.queued_us,
        "ready_us": job.ready_us,
        "started_us": job.started_us,
        "ended_us": job.ended_us,
        "exit_code": job.exit_code,
        "attempt_count": job.attempt_count,
        "retries_used": job.retries_used,
        "infra_retries_used": job.infra_retries_used,
        "preemptions_used": job.preemptions_used,
    }


def _columns(attempt: Attempt) -> dict[str, Any]:
    plain = {name: getattr(attempt, name) for name in _ATTEMPT_FIELDS}
    return plain | {
        "members": _members_text(attempt.members),
        "addresses": json.dumps(attempt.addresses),
        "gpu_indices": json.dumps(attempt.gpu_indices),
    }


def _members_text(members: Sequence[Member]) -> str:
    """Nothing for one process alone: the attempt's own columns say what is known of it."""
    if len(members) == 1:
        return ""
    return json.dumps([[member.node_id, member.seen.model_dump_json(exclude_defaults=True)] for member in members])


def _members(row: Row[Any], prefix: str) -> tuple[Member, ...]:
    value = {name: row._mapping[prefix + name] for name in ("members", "node_id", "execution_revision", "ended_us")}
    if not value["members"]:
        state = "" if value["ended_us"] is None else "ended"
        return (Member(0, value["node_id"], Execution(state=state, revision=value["execution_revision"])),)
    found = enumerate(json.loads(value["members"]))
    return tuple(Member(rank, node_id, Execution.model_validate_json(seen)) for rank, (node_id, seen) in found)


def _node_ids(row: Row[Any]) -> frozenset[str]:
    return frozenset(node_id for node_id, _ in json.loads(row.members)) if row.members else frozenset([row.node_id])


def _entry(job: Job, now_us: int) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "revision": job.revision,
        "at_us": now_us,
        "state": job.state,
        "detail": job.detail,
        "attempt": job.attempt_count,
    }


def _case(row: Row[Any]) -> Case:
    values = {name: row._mapping[name] for name in _JOB_FIELDS}
    values["template"] = JobTemplate.model_validate_json(row.template)
    return Case(Job(**values), _attempt(row, _NEWEST) if row._mapping[_NEWEST + "id"] else None)


def _attempt(row: Row[Any], prefix: str) -> Attempt:
    values = {name: row._mapping[prefix + name] for name in _ATTEMPT_FIELDS}
    values["members"] = _members(row, prefix)
    values["addresses"] = json.loads(values["addresses"])
    values["gpu_indices"] = tuple(json.loads(values["gpu_indices"]))
    return Attempt(**values)


def _demand(row: Row[Any], now_us: int) -> Demand | None:
    shape = Shape(row.milli_gpus, row.milli_cpus, row.memory_bytes)
    if row.state == "queued":
        ready_us = row.ready_us if row.ready_us > now_us else 0
        return Demand(row.id, row.team_id, shape, row.created_us, ready_us)
    if row.node_id and row.attempt_ended_us is None:
        return Demand(row.id, row.team_id, shape, row.created_us, node_id=row.node_id)
    return None
