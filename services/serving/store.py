"""Serving's tables: deployments, their revisions, and the jobs ordered for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Index, LargeBinary, String, UniqueConstraint, update
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel, col, select

from libs.common.clock import from_us, to_us
from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    Deployment,
    DeploymentDeleted,
    DeploymentFailed,
    DeploymentReady,
    DeploymentStarting,
    HaltJob,
    JobTemplate,
    OrderJob,
    Principal,
    Resources,
    Revision,
)
from libs.common.store import Skeleton, UnitOfWork
from services.serving.domain.front import NodeDoor, endpoint_path
from services.serving.domain.lifecycles import DEPLOYMENT, REVISION, Trigger
from services.serving.domain.plan import OrderedJob

# What is told when a deployment enters a state; `building` is told by its creation.
TOLD: dict[str, Callable[[Deployment], Message]] = {
    "starting": lambda snapshot: DeploymentStarting(deployment=snapshot),
    "ready": lambda snapshot: DeploymentReady(deployment=snapshot),
    "failed": lambda snapshot: DeploymentFailed(deployment=snapshot),
    "deleted": lambda snapshot: DeploymentDeleted(deployment=snapshot),
}


class Base(SQLModel, registry=registry()):
    """Tables of this service only."""


class DeploymentRow(Base, table=True):
    __tablename__ = "deployment"
    __table_args__ = (
        Index("deployment_of_team", "team_id", "id"),
        Index("deployment_by_name", "team_id", "name"),
        Index("deployment_due", "due_us"),
    )

    id: str = Field(primary_key=True, sa_type=String(40))
    revision: int = Field(default=1, sa_type=BigInteger)
    team_id: str
    project_id: str
    name: str
    # The name while the deployment exists, then null: host names are unique in the whole installation.
    host_label: str | None = Field(default=None, unique=True)
    # Its own host name, for browsers.
    host: str
    state: str
    detail: str = ""
    desired_state: str = "running"
    cpu_count: float = 0.0
    memory_bytes: int = Field(default=0, sa_type=BigInteger)
    gpu_count: float = 0.0
    created_by: str
    created_us: int = Field(sa_type=BigInteger)
    token_sealed: bytes = Field(sa_type=LargeBinary)
    token_hash: str
    # Number of the present revision.
    number: int = 1
    # "host:port" to which Traefik is told to send requests.
    target: str = ""
    # When the present replica became ready, or 0; and whether one ever did.
    ready_us: int = Field(default=0, sa_type=BigInteger)
    served: bool = False
    deaths: int = 0
    restart_us: int = Field(default=0, sa_type=BigInteger)
    # When to look at it next. Events set it to 0, which is at once.
    due_us: int = Field(default=0, sa_type=BigInteger)


class RevisionRow(Base, table=True):
    __tablename__ = "deployment_revision"
    __table_args__ = (UniqueConstraint("deployment_id", "number"),)

    # "<deployment>.<number>"
    id: str = Field(primary_key=True)
    revision: int = Field(default=1, sa_type=BigInteger)
    deployment_id: str
    number: int
    model_id: str
    model_name: str
    model_version: int
    framework: str
    model_fileset_id: str
    bento_fileset_id: str = ""
    state: str
    detail: str = ""
    build_job_id: str = ""
    replica_job_id: str = ""
    created_us: int = Field(sa_type=BigInteger)


class NodeDoorRow(Base, table=True):
    """Where the running jobs of a node are entered, as its executor says."""

    __tablename__ = "node_door"

    id: str = Field(primary_key=True, sa_type=String(64))
    executor: str = Field(sa_type=String(64))
    address: str


class OrderedJobRow(Base, table=True):
    """A job whose id this service chose: events of all other jobs are none of its business."""

    __tablename__ = "ordered_job"
    __table_args__ = (Index("ordered_job_of", "deployment_id", "ended_us"),)

    id: str = Field(primary_key=True, sa_type=String(40))
    deployment_id: str
    number: int
    team_id: str
    # build or replica
    purpose: str
    # The port a replica listens on, inside its job.
    port: int = 0
    # As the scheduler last said; `ordered` until it said anything.
    state: str = "ordered"
    seen_revision: int = Field(default=0, sa_type=BigInteger)
    address: str = ""
    detail: str = ""
    template: str = ""
    ordered_us: int = Field(sa_type=BigInteger)
    running_us: int = Field(default=0, sa_type=BigInteger)
    ended_us: int = Field(default=0, sa_type=BigInteger)
    # When the scheduler was last asked about it, and whether it was told to halt it.
    asked_us: int = Field(default=0, sa_type=BigInteger)
    halted: bool = False

    def facts(self) -> OrderedJob:
        return OrderedJob(
            id=self.id,
            purpose=self.purpose,
            state=self.state,
            address=self.address,
            detail=self.detail,
            ordered_at=from_us(self.ordered_us),
            running_at=moment(self.running_us),
            ended_at=moment(self.ended_us),
        )


SKELETON = Skeleton(Base.metadata)


class ServingUnit(UnitOfWork):
    """One transaction of serving."""

    async def deployment(self, deployment_id: str) -> DeploymentRow | None:
        return await self.session.get(DeploymentRow, deployment_id)

    async def find_deployment(self, team_id: str, id_or_name: str) -> DeploymentRow | None:
        """By id, also when deleted, or by name; of this team only."""
        named = (col(DeploymentRow.name) == id_or_name) & (col(DeploymentRow.state) != "deleted")
        query = select(DeploymentRow).where(
            DeploymentRow.team_id == team_id, (col(DeploymentRow.id) == id_or_name) | named
        )
        return (await self.session.exec(query)).first()

    async def host_taken(self, name: str) -> bool:
        query = select(DeploymentRow.id).where(DeploymentRow.host_label == name)
        return (await self.session.exec(query)).first() is not None

    async def page(self, team_id: str, project_id: str, before: str, limit: int) -> Sequence[DeploymentRow]:
        """Newest first, without the deleted ones."""
        query = select(DeploymentRow).where(DeploymentRow.team_id == team_id, col(DeploymentRow.state) != "deleted")
        if project_id:
            query = query.where(DeploymentRow.project_id == project_id)
        if before:
            query = query.where(col(DeploymentRow.id) < before)
        return (await self.session.exec(query.order_by(col(DeploymentRow.id).desc()).limit(limit))).all()

    async def due(self, now: datetime, limit: int) -> Sequence[str]:
        """Ids of those to look at, longest due first."""
        query = (
            select(DeploymentRow.id)
            .where(DeploymentRow.due_us <= to_us(now), col(DeploymentRow.state) != "deleted")
            .order_by(col(DeploymentRow.due_us), col(DeploymentRow.id))
        )
        return (await self.session.exec(query.limit(limit))).all()

    async def next_due_us(self) -> int | None:
        query = select(DeploymentRow.due_us).where(col(DeploymentRow.state) != "deleted")
        return (await self.session.exec(query.order_by(col(DeploymentRow.due_us)).limit(1))).first()

    async def set_due(self, deployment_id: str, due_us: int, unless_changed_from: int | None = None) -> bool:
        """Moves the next look; with the last argument only if nobody has moved it in between."""
        query = update(DeploymentRow).where(col(DeploymentRow.id) == deployment_id)
        if unless_changed_from is not None:
            query = query.where(col(DeploymentRow.due_us) == unless_changed_from)
        result = await self.session.exec(query.values(due_us=due_us))
        return result.rowcount == 1

    async def forget_leases(self) -> None:
        """Makes all due. Only at start: a database has one process, so whoever was looking is gone."""
        waiting = (col(DeploymentRow.due_us) > 0) & (col(DeploymentRow.state) != "deleted")
        await self.session.exec(update(DeploymentRow).where(waiting).values(due_us=0))

    async def routed(self) -> Sequence[DeploymentRow]:
        """All that have a place in the proxy: with a target, or between two replicas."""
        between = (col(DeploymentRow.state) == "starting") & col(DeploymentRow.served)
        query = select(DeploymentRow).where((col(DeploymentRow.target) != "") | between)
        return (await self.session.exec(query)).all()

    async def doors(self) -> list[NodeDoor]:
        rows = (await self.session.exec(select(NodeDoorRow).order_by(col(NodeDoorRow.id)))).all()
        return [NodeDoor(row.id, row.address) for row in rows]

    async def keep_doors(self, executor: str, doors: Sequence[NodeDoor]) -> None:
        """All doors of this executor's nodes; those that it does not name are no more."""
        of_executor = select(NodeDoorRow).where(col(NodeDoorRow.executor) == executor)
        known = {row.id: row for row in (await self.session.exec(of_executor)).all()}
        for door in doors:
            row = known.pop(door.node_id, None)
            if row is None or row.address != door.address:
                await self.session.merge(NodeDoorRow(id=door.node_id, executor=executor, address=door.address))
        for row in known.values():
            await self.session.delete(row)

    async def revision_of(self, deployment: DeploymentRow) -> RevisionRow:
        row = await self.session.get(RevisionRow, revision_id(deployment.id, deployment.number))
        assert row, "a deployment and its revision are written in one commit"
        return row

    async def revisions_of(self, deployments: Sequence[DeploymentRow]) -> dict[str, RevisionRow]:
        """By deployment."""
        wanted = [revision_id(row.id, row.number) for row in deployments]
        rows = await self.session.exec(select(RevisionRow).where(col(RevisionRow.id).in_(wanted)))
        return {row.deployment_id: row for row in rows}

    async def job(self, job_id: str) -> OrderedJobRow | None:
        return await self.session.get(OrderedJobRow, job_id)

    async def live_jobs(self, deployment_id: str) -> Sequence[OrderedJobRow]:
        query = select(OrderedJobRow).where(OrderedJobRow.deployment_id == deployment_id, OrderedJobRow.ended_us == 0)
        return (await self.session.exec(query)).all()

    async def note_job(self, job_id: str, seen_revision: int, values: dict[str, Any]) -> bool:
        """Saves what the scheduler said, unless something newer is known already."""
        query = update(OrderedJobRow).where(
            col(OrderedJobRow.id) == job_id, col(OrderedJobRow.seen_revision) < seen_revision
        )
        values |= {"seen_revision": seen_revision}
        result = await self.session.exec(query.values(**values))
        return result.rowcount == 1

    async def set_job(self, job_id: str, values: dict[str, Any]) -> None:
        """Saves what this service itself found out about a job."""
        await self.session.exec(update(OrderedJobRow).where(col(OrderedJobRow.id) == job_id).values(**values))

    async def move(
        self,
        deployment: DeploymentRow,
        trigger: Trigger,
        values: Mapping[str, Any],
        revision_values: Mapping[str, Any] | None = None,
    ) -> Deployment:
        """Makes a move of the tables in domain.lifecycles and tells it; answers the new snapshot.

        Raises:
            IllegalTransition, StaleRevision.
        """
        row = await self.revision_of(deployment)
        state = DEPLOYMENT.next_state(deployment.id, deployment.state, trigger)
        revision_state = REVISION.next_state(row.id, row.state, trigger)
        told = {"detail": str(values["detail"])} if "detail" in values else {}
        changes = {**told, **(revision_values or {}), "state": revision_state}
        await self.swap(DeploymentRow, deployment.id, deployment.revision, {**values, "state": state})
        await self.swap(RevisionRow, row.id, row.revision, changes)
        await self.session.refresh(deployment)
        await self.session.refresh(row)
        result = snapshot(deployment, row)
        if state in TOLD:
            await self.tell(TOLD[state](result), deployment)
        return result

    async def tell(self, event: Message, deployment: DeploymentRow) -> None:
        await self.emit(
            event,
            team_id=deployment.team_id,
            object_id=deployment.id,
            project_id=deployment.project_id,
            revision=deployment.revision,
        )

    async def order_job(self, deployment: DeploymentRow, job_id: str, purpose: str, template: JobTemplate) -> None:
        """Records the job and orders it; the order may be repeated, as the job's id is in it."""
        row = OrderedJobRow(
            id=job_id,
            deployment_id=deployment.id,
            number=deployment.number,
            team_id=deployment.team_id,
            purpose=purpose,
            port=template.ports[0] if template.ports else 0,
            template=template.model_dump_json(),
            ordered_us=to_us(self.now),
            asked_us=to_us(self.now),
        )
        self.session.add(row)
        await self.repeat_order(deployment, row)

    async def repeat_order(self, deployment: DeploymentRow, job: OrderedJobRow) -> None:
        template = JobTemplate.model_validate_json(job.template)
        order = OrderJob(job_id=job.id, project_id=deployment.project_id, template=template)
        await self._command(order, deployment, job.id)

    async def halt_job(self, deployment: DeploymentRow, job_id: str) -> None:
        await self._command(HaltJob(job_id=job_id), deployment, job_id)

    async def _command(self, command: Message, deployment: DeploymentRow, job_id: str) -> None:
        await self.emit(
            command,
            team_id=deployment.team_id,
            object_id=job_id,
            project_id=deployment.project_id,
            sender=service_principal(deployment.team_id),
        )


def service_principal(team_id: str) -> Principal:
    """This service, acting for a team."""
    return Principal(kind="service", id="serving", name="serving", team_id=team_id)


def snapshot(deployment: DeploymentRow, revision: RevisionRow) -> Deployment:
    """The whole object as others may see it, without the endpoint's token."""
    return Deployment(
        id=deployment.id,
        team_id=deployment.team_id,
        project_id=deployment.project_id,
        name=deployment.name,
        state=deployment.state,
        detail=deployment.detail,
        desired_state=deployment.desired_state,
        revision=Revision(
            number=revision.number,
            model_id=revision.model_id,
            model_name=revision.model_name,
            model_version=revision.model_version,
            framework=revision.framework,
            model_fileset_id=revision.model_fileset_id,
            bento_fileset_id=revision.bento_fileset_id,
            state=revision.state,
            detail=revision.detail,
            build_job_id=revision.build_job_id,
            replica_job_id=revision.replica_job_id,
            created_at=from_us(revision.created_us),
        ),
        path=endpoint_path(deployment.name),
        host=deployment.host,
        created_by=deployment.created_by,
        created_at=from_us(deployment.created_us),
        ready_at=moment(deployment.ready_us),
        record_revision=deployment.revision,
        resources=Resources(
            cpu_count=deployment.cpu_count,
            memory_bytes=deployment.memory_bytes,
            gpu_count=deployment.gpu_count,
        ),
    )


def revision_id(deployment_id: str, number: int) -> str:
    return f"{deployment_id}.{number}"


def moment(microseconds: int) -> datetime | None:
    return from_us(microseconds) if microseconds else None
