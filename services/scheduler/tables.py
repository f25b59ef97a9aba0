"""The scheduler's tables."""

from __future__ import annotations

from typing import cast

from sqlalchemy import BigInteger, Index, Table, Text, text
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel

from libs.common.store import Skeleton

_OPEN = text("ended_us IS NULL")


class Base(SQLModel, registry=registry()):
    """Tables of this service alone."""


class JobRow(Base, table=True):
    """A job. What the queue needs of its template stands beside it, so that the queue is read without opening them.

    `parts` is what each process asks for, by rank: see `rows.parts_text`.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_by_team", "team_id", "id"),
        Index("jobs_by_project", "project_id", "id"),
        Index("jobs_by_experiment", "experiment_id", "id"),
        Index("jobs_open", "state", "checked_us", sqlite_where=_OPEN, postgresql_where=_OPEN),
    )

    id: str = Field(primary_key=True)
    team_id: str
    project_id: str
    experiment_id: str
    kind: str
    template: str = Field(sa_type=Text)
    parts: str = Field(sa_type=Text)
    priority: int
    max_wait_us: int = Field(sa_type=BigInteger)
    created_by: str
    state: str
    detail: str = Field(sa_type=Text)
    desired_state: str
    revision: int
    created_us: int = Field(sa_type=BigInteger)
    queued_us: int | None = Field(sa_type=BigInteger)
    ready_us: int = Field(sa_type=BigInteger)
    started_us: int | None = Field(sa_type=BigInteger)
    ended_us: int | None = Field(sa_type=BigInteger)
    checked_us: int = Field(sa_type=BigInteger)
    exit_code: int | None
    attempt_id: str | None
    attempt_count: int
    retries_used: int
    infra_retries_used: int
    preemptions_used: int
    traceparent: str


class AttemptRow(Base, table=True):
    """One try of a job; `checked_us` is when the executor was last heard of it, or asked.

    `node_ids` is where its processes are, by rank; `node_id` is the first of them.
    `seen` is what was heard of each rank of a gang, as JSON; empty for a job of one process, of which the other columns
    say all.
    """

    __tablename__ = "attempts"
    __table_args__ = (
        Index("attempts_by_job", "job_id", "number", unique=True),
        Index("attempts_open", "checked_us", sqlite_where=_OPEN, postgresql_where=_OPEN),
    )

    id: str = Field(primary_key=True)
    job_id: str
    number: int
    node_id: str
    node_ids: str = Field(sa_type=Text)
    seen: str = Field(sa_type=Text)
    decided_by: int | None
    state: str
    reason: str = ""
    detail: str = Field(sa_type=Text)
    exit_code: int | None
    created_us: int = Field(sa_type=BigInteger)
    started_us: int | None = Field(sa_type=BigInteger)
    ended_us: int | None = Field(sa_type=BigInteger)
    checked_us: int = Field(sa_type=BigInteger)
    isolation: str
    peak_memory_bytes: int = Field(sa_type=BigInteger)
    addresses: str = Field(sa_type=Text)
    gpu_indices: str = Field(sa_type=Text)
    origin: str = Field(default="{}", sa_type=Text, sa_column_kwargs={"server_default": "{}"})
    execution_revision: int = Field(sa_type=BigInteger)
    forgotten: bool


class TimelineRow(Base, table=True):
    """What happened to a job, one entry for each change of what it or its attempt is, or is wanted to be.

    `actor` is who moved it: a person, or the service that saw the cause.
    """

    __tablename__ = "timeline"

    job_id: str = Field(primary_key=True)
    revision: int = Field(primary_key=True)
    at_us: int = Field(sa_type=BigInteger)
    state: str
    detail: str = Field(sa_type=Text)
    attempt: int
    actor: str
    cause: str
    trace_id: str


class ExperimentRow(Base, table=True):
    """A named template plus its jobs."""

    __tablename__ = "experiments"
    __table_args__ = (
        Index("experiments_by_team", "team_id", "id"),
        Index("experiments_by_project", "project_id", "id"),
    )

    id: str = Field(primary_key=True)
    team_id: str
    project_id: str
    name: str
    kind: str
    created_by: str
    created_us: int = Field(sa_type=BigInteger)


class ProjectRow(Base, table=True):
    """What the registry says of projects: enough to refuse jobs in those that are archived or deleted.

    A job may come before the word of its project: the row then has the state `unheard` until the registry is asked.
    `checked_us` is when the registry was last heard of it, or asked.
    """

    __tablename__ = "projects"
    __table_args__ = (Index("projects_checked", "checked_us"),)

    id: str = Field(primary_key=True)
    team_id: str
    state: str
    revision: int
    checked_us: int = Field(sa_type=BigInteger)


class InventoryRow(Base, table=True):
    """The newest word of an executor on its nodes, and when it came by our own clock."""

    __tablename__ = "inventories"

    executor: str = Field(primary_key=True)
    nodes: str = Field(sa_type=Text)
    detail: str = Field(sa_type=Text)
    sent_us: int = Field(sa_type=BigInteger)
    heard_us: int = Field(sa_type=BigInteger)


SKELETON = Skeleton(Base.metadata)

JOBS = cast("Table", JobRow.__table__)  # type: ignore[attr-defined]
ATTEMPTS = cast("Table", AttemptRow.__table__)  # type: ignore[attr-defined]
TIMELINE = cast("Table", TimelineRow.__table__)  # type: ignore[attr-defined]
EXPERIMENTS = cast("Table", ExperimentRow.__table__)  # type: ignore[attr-defined]
PROJECTS = cast("Table", ProjectRow.__table__)  # type: ignore[attr-defined]
INVENTORIES = cast("Table", InventoryRow.__table__)  # type: ignore[attr-defined]
