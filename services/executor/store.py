"""The executor's tables and its unit of work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from sqlalchemy import JSON, BigInteger, Column, Index, Integer, String, Text, and_, func, text
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel, col, delete, select, update

from libs.common.clock import from_us, to_us
from libs.common.contracts.messages import Demand, Execution, JobTemplate
from libs.common.ids import secret_hash
from libs.common.store import Skeleton, UnitOfWork
from services.executor.domain.demand import HOLDS_S
from services.executor.domain.execution import ACCEPTED, ENDED, STARTING
from services.executor.domain.gang import GangFacts
from services.executor.domain.inventory import KnownNode
from services.executor.ports import StartOrder

PAGE = 200
NEVER_US = 2**62
_UNSEALED = text("state = 'ended' AND NOT log_sealed")


class Base(SQLModel, registry=registry()):
    """Own metadata, so that services can share a process."""


class ExecutionRow(Base, table=True):
    """One process of an attempt. A gang has a row for each rank, which are made together and reserved together.

    `gang`: of a gang, on which node each rank is, its ports and its secret; empty for a job of one process.

    `visit_us`: when the driving loop has to look at it next; it is what bounds a pass and orders it.

    `asked_us`: when it ended, and from then on when storage was last asked whether its log is sealed.
    """

    __tablename__ = "executions"
    __table_args__ = (
        Index("executions_visit", "visit_us"),
        Index("executions_job", "job_id"),
        Index("executions_attempt", "attempt_id", "rank", unique=True),
        Index("executions_ended", "ended_us"),
        Index("executions_unsealed", "asked_us", sqlite_where=_UNSEALED, postgresql_where=_UNSEALED),
    )

    id: str = Field(primary_key=True, max_length=40)
    attempt_id: str = Field(max_length=40)
    rank: int = 0
    gang: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    job_id: str = Field(max_length=40)
    number: int
    team_id: str = Field(max_length=40)
    project_id: str = Field(default="", max_length=40)
    experiment_id: str = Field(default="", max_length=40)
    node_id: str = Field(max_length=64)
    template: str = Field(sa_column=Column(Text, nullable=False))
    traceparent: str = Field(default="", max_length=64)
    state: str = Field(default=ACCEPTED, max_length=16, index=True)
    stop_reason: str = Field(default="", max_length=500)
    reason: str = Field(default="", max_length=16)
    detail: str = Field(default="", sa_column=Column(Text, nullable=False))
    exit_code: int | None = None
    signal: int | None = None
    peak_memory_bytes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    isolation: str = Field(default="", max_length=16)
    addresses: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    gpu_indices: list[int] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    origin: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    accepted_us: int = Field(sa_column=Column(BigInteger, nullable=False))
    told_us: int | None = Field(default=None, sa_column=Column(BigInteger))
    started_us: int | None = Field(default=None, sa_column=Column(BigInteger))
    ended_us: int | None = Field(default=None, sa_column=Column(BigInteger))
    log_sealed: bool = False
    asked_us: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    visit_us: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    revision: int = Field(default=1, sa_column=Column(Integer, nullable=False))

    def snapshot(self) -> Execution:
        return Execution(
            attempt_id=self.attempt_id,
            rank=self.rank,
            job_id=self.job_id,
            number=self.number,
            team_id=self.team_id,
            project_id=self.project_id,
            node_id=self.node_id,
            state=self.state,
            reason=self.reason,
            detail=self.detail,
            exit_code=self.exit_code,
            signal=self.signal,
            peak_memory_bytes=self.peak_memory_bytes,
            isolation=self.isolation,
            addresses=self.addresses,
            gpu_indices=tuple(self.gpu_indices),
            origin=self.origin,
            started_at=from_us(self.started_us) if self.started_us else None,
            ended_at=from_us(self.ended_us) if self.ended_us else None,
            revision=self.revision,
        )

    def read_template(self) -> JobTemplate:
        """The job's whole template: that of the rank follows from it."""
        return JobTemplate.from_wire(self.template.encode())

    def read_gang(self) -> GangFacts | None:
        if not self.gang:
            return None
        return GangFacts(tuple(self.gang["node_ids"]), self.gang["first_port"], self.gang["key"])


class TokenRow(Base, table=True):
    """Hashes of the tokens of attempts; `attempt_id` is the execution's: each rank has its own token.

    An order repeated after a crash has a new one, and the earlier may be in use.
    """

    __tablename__ = "attempt_tokens"

    token_hash: str = Field(primary_key=True, max_length=64)
    attempt_id: str = Field(max_length=40, index=True)


class TeamRow(Base, table=True):
    """A small number per team, from which its uid on the nodes is made. Never reused."""

    __tablename__ = "teams"

    team_id: str = Field(primary_key=True, max_length=40)
    number: int = Field(unique=True)


class NodeRow(Base, table=True):
    __tablename__ = "nodes"

    id: str = Field(primary_key=True, max_length=64)
    hostname: str = Field(max_length=255)
    state: str = Field(max_length=16)
    cpu_count: float
    memory_bytes: int = Field(sa_column=Column(BigInteger, nullable=False))
    gpu_count: float
    gpu_model: str = Field(default="", max_length=255)
    isolation: str = Field(default="", max_length=16)
    isolation_detail: str = Field(default="", sa_column=Column(Text, nullable=False))
    gpu_memory_bytes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    address: str = Field(default="", max_length=255)
    runtimes: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    network: str = Field(default="", max_length=16)
    door: str = Field(default="", max_length=255)
    draining: bool = False
    is_head: bool = False
    seen_us: int = Field(sa_column=Column(BigInteger, nullable=False))


class DrainRow(Base, table=True):
    """A node that takes no new work, present or not: it may be away for a while."""

    __tablename__ = "drains"

    node_id: str = Field(primary_key=True, max_length=64)
    since_us: int = Field(sa_column=Column(BigInteger, nullable=False))


class NodeTokenRow(Base, table=True):
    """A machine's ticket into the cluster, of which only the hash is kept: good once, and not for long."""

    __tablename__ = "node_tokens"

    token_hash: str = Field(primary_key=True, max_length=64)
    expires_us: int = Field(sa_column=Column(BigInteger, nullable=False))
    used_us: int | None = Field(default=None, sa_column=Column(BigInteger))
    hostname: str = Field(default="", max_length=255)


class DemandRow(Base, table=True):
    """One row: the shapes of queued work that no present node can take, and when the scheduler last said so."""

    __tablename__ = "demand"

    id: int = Field(primary_key=True)
    shapes: list[dict[str, Any]] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    told_us: int = Field(sa_column=Column(BigInteger, nullable=False))


class ClusterRow(Base, table=True):
    """One row: why there is no node, for people."""

    __tablename__ = "cluster"

    id: int = Field(primary_key=True)
    detail: str = Field(default="", sa_column=Column(String(500), nullable=False))


class Trace(NamedTuple):
    """As much of an execution as tells whether its node is right to hold it.

    Args:
        may_go: its log is in object storage, and nobody is about to delete its folder.
    """

    state: str
    reason: str
    may_go: bool


SKELETON = Skeleton(Base.metadata)


class ExecutorUnit(UnitOfWork):
    """One transaction of the executor."""

    async def execution(self, execution_id: str) -> ExecutionRow | None:
        return await self.session.get(ExecutionRow, execution_id)

    async def executions(self, execution_ids: Iterable[str]) -> Sequence[ExecutionRow]:
        query = select(ExecutionRow).where(col(ExecutionRow.id).in_(list(execution_ids)))
        return (await self.session.exec(query)).all()

    async def of_attempts(self, attempt_ids: Iterable[str]) -> Sequence[ExecutionRow]:
        """All ranks of these attempts, in their order."""
        query = select(ExecutionRow).where(col(ExecutionRow.attempt_id).in_(list(attempt_ids)))
        return (await self.session.exec(query.order_by(ExecutionRow.attempt_id, col(ExecutionRow.rank)))).all()

    async def of_rank(self, attempt_id: str, rank: int) -> ExecutionRow | None:
        query = select(ExecutionRow).where(ExecutionRow.attempt_id == attempt_id, ExecutionRow.rank == rank)
        return (await self.session.exec(query)).first()

    async def ports_taken(self, node_ids: Iterable[str]) -> frozenset[int]:
        """The first ports of the gangs that have not ended and have a rank on one of these nodes."""
        wanted = set(node_ids)
        query = select(ExecutionRow.gang).where(
            col(ExecutionRow.node_id).in_(list(wanted)), ExecutionRow.state != ENDED
        )
        gangs = (await self.session.exec(query)).all()
        return frozenset(gang["first_port"] for gang in gangs if gang)

    async def traces_of(self, attempt_ids: Collection[str]) -> dict[str, Trace]:
        """What is known of these attempts, without the templates: agents list all that they have, every two seconds."""
        may_go = and_(col(ExecutionRow.visit_us) == NEVER_US, col(ExecutionRow.log_sealed))
        ids, found = sorted(attempt_ids), dict[str, Trace]()
        for begin in range(0, len(ids), PAGE):
            chosen = col(ExecutionRow.id).in_(ids[begin : begin + PAGE])
            columns = select(ExecutionRow.id, ExecutionRow.state, ExecutionRow.reason, may_go)
            rows = await self.session.exec(columns.where(chosen))
            found |= {row[0]: Trace(*row[1:]) for row in rows.all()}
        return found

    async def executions_of_job(self, job_id: str) -> Sequence[ExecutionRow]:
        return (await self.session.exec(select(ExecutionRow).where(ExecutionRow.job_id == job_id))).all()

    async def unfinished(self) -> Sequence[tuple[str, str, str, str]]:
        """Id, attempt, node and state of each, without the templates: this is read every two seconds."""
        query = select(ExecutionRow.id, ExecutionRow.attempt_id, ExecutionRow.node_id, ExecutionRow.state)
        return (await self.session.exec(query.where(ExecutionRow.state != ENDED))).all()

    async def holders(self) -> Sequence[tuple[str, str, str, str]]:
        """Node, team, job and template of all that holds something on a node."""
        columns = select(ExecutionRow.node_id, ExecutionRow.team_id, ExecutionRow.job_id, ExecutionRow.template)
        return (await self.session.exec(columns.where(ExecutionRow.state != ENDED))).all()

    async def gpu_users(self, node_ids: Iterable[str]) -> Sequence[ExecutionRow]:
        """What has GPUs of these nodes, by our own record."""
        query = select(ExecutionRow).where(ExecutionRow.state != ENDED, col(ExecutionRow.node_id).in_(list(node_ids)))
        return [row for row in (await self.session.exec(query)).all() if row.gpu_indices]

    async def due(self) -> Sequence[ExecutionRow]:
        """Executions with something to do, longest due first; at most PAGE."""
        query = (
            select(ExecutionRow)
            .where(ExecutionRow.visit_us <= to_us(self.now))
            .order_by(col(ExecutionRow.visit_us), col(ExecutionRow.id))
            .limit(PAGE)
        )
        return (await self.session.exec(query)).all()

    async def unsealed(self, before_us: int) -> Sequence[ExecutionRow]:
        """Ended ones whose log is not known to be sealed, those first that were asked for longest ago; at most PAGE."""
        query = select(ExecutionRow).where(
            ExecutionRow.state == ENDED, ~col(ExecutionRow.log_sealed), ExecutionRow.asked_us < before_us
        )
        return (await self.session.exec(query.order_by(col(ExecutionRow.asked_us)).limit(PAGE))).all()

    async def change(self, row: ExecutionRow, **values: Any) -> ExecutionRow:
        """Saves values under the row's revision and answers the row as it is then."""
        await self.swap(ExecutionRow, row.id, row.revision, values)
        self.session.expunge(row)
        changed = await self.session.get(ExecutionRow, row.id, populate_existing=True)
        assert changed
        return changed

    async def visit_again(self, row: ExecutionRow, at_us: int) -> None:
        """When to look next, unless somebody changed the row since it was read: it is looked at again then."""
        unchanged = (col(ExecutionRow.id) == row.id, col(ExecutionRow.revision) == row.revision)
        await self.session.exec(update(ExecutionRow).where(*unchanged).values(visit_us=at_us))

    async def forget_tokens(self, execution_ids: Sequence[str]) -> None:
        await self.session.exec(delete(TokenRow).where(col(TokenRow.attempt_id).in_(execution_ids)))

    async def forget_ended(self, before_us: int) -> int:
        """Deletes what ended before, with its tokens; at most PAGE. How many there were."""
        old = select(ExecutionRow.id).where(ExecutionRow.state == ENDED, col(ExecutionRow.ended_us) < before_us)
        ids = (await self.session.exec(old.order_by(col(ExecutionRow.ended_us)).limit(PAGE))).all()
        if ids:
            await self.forget_tokens(ids)
            await self.session.exec(delete(ExecutionRow).where(col(ExecutionRow.id).in_(ids)))
        return len(ids)

    async def take_up(self, order: StartOrder, node_id: str) -> None:
        """The row that an order must have had. Its project's archive, limits and the like are the scheduler's."""
        if await self.execution(order.execution_id):
            return
        row = ExecutionRow(
            id=order.execution_id,
            attempt_id=order.attempt_id,
            rank=order.rank,
            gang=_gang_columns(order),
            job_id=order.job_id,
            number=order.number,
            team_id=order.team_id,
            project_id=order.project_id,
            experiment_id=order.experiment_id,
            node_id=node_id,
            template=order.template.to_wire().decode(),
            traceparent=order.traceparent,
            state=STARTING,
            gpu_indices=list(order.gpu_indices),
            accepted_us=to_us(self.now),
            told_us=to_us(self.now),
            visit_us=NEVER_US,
        )
        self.session.add(row)
        await self.keep_token(secret_hash(order.token), order.execution_id)

    async def keep_token(self, token_hash: str, execution_id: str) -> None:
        self.session.add(TokenRow(token_hash=token_hash, attempt_id=execution_id))

    async def execution_of_token(self, token_hash: str) -> ExecutionRow | None:
        token = await self.session.get(TokenRow, token_hash)
        return await self.execution(token.attempt_id) if token else None

    async def team_number(self, team_id: str) -> int:
        """The team's number, from 1; a new team gets the next one."""
        known = await self.session.get(TeamRow, team_id)
        if known:
            return known.number
        highest = (await self.session.exec(select(func.max(TeamRow.number)))).one()
        row = TeamRow(team_id=team_id, number=(highest or 0) + 1)
        self.session.add(row)
        await self.session.flush()
        return row.number

    async def nodes(self) -> Sequence[NodeRow]:
        return (await self.session.exec(select(NodeRow).order_by(col(NodeRow.id)))).all()

    async def node(self, node_id: str) -> NodeRow | None:
        return await self.session.get(NodeRow, node_id)

    async def save_nodes(self, nodes: Iterable[KnownNode], detail: str) -> None:
        """Replaces the inventory; what is no longer in it is forgotten."""
        seen_us = {row.id: row.seen_us for row in await self.nodes()}
        await self.session.exec(delete(NodeRow))
        for node in nodes:
            at = seen_us.get(node.id, to_us(self.now)) if node.state != "ready" else to_us(self.now)
            self.session.add(node_row(node, at))
        await self.session.merge(ClusterRow(id=1, detail=detail[:500]))

    async def draining(self) -> frozenset[str]:
        """Nodes that take no new work."""
        return frozenset((await self.session.exec(select(DrainRow.node_id))).all())

    async def drain(self, node_id: str) -> None:
        if await self.session.get(DrainRow, node_id) is None:
            self.session.add(DrainRow(node_id=node_id, since_us=to_us(self.now)))

    async def hasten(self, node_id: str) -> None:
        """What waits on this node to be cleaned up later is due now."""
        ended = and_(col(ExecutionRow.node_id) == node_id, col(ExecutionRow.state) == ENDED)
        later = col(ExecutionRow.visit_us) < NEVER_US
        await self.session.exec(update(ExecutionRow).where(ended, later).values(visit_us=0))

    async def undrain(self, node_ids: Iterable[str]) -> None:
        await self.session.exec(delete(DrainRow).where(col(DrainRow.node_id).in_(list(node_ids))))

    async def keep_node_token(self, token_hash: str, expires_us: int) -> None:
        await self.session.exec(delete(NodeTokenRow).where(col(NodeTokenRow.expires_us) < to_us(self.now)))
        self.session.add(NodeTokenRow(token_hash=token_hash, expires_us=expires_us))

    async def node_token(self, token_hash: str) -> NodeTokenRow | None:
        return await self.session.get(NodeTokenRow, token_hash)

    async def keep_demand(self, demands: Iterable[Demand]) -> None:
        """Replaces what is wanted."""
        shapes = [demand.model_dump(mode="json") for demand in demands]
        await self.session.merge(DemandRow(id=1, shapes=shapes, told_us=to_us(self.now)))

    async def demand(self, now_us: int) -> tuple[Demand, ...]:
        """What is wanted, as long as the scheduler goes on saying so."""
        row = await self.session.get(DemandRow, 1)
        if row is None or now_us - row.told_us > HOLDS_S * 1_000_000:
            return ()
        return tuple(Demand.model_validate(shape) for shape in row.shapes)

    async def cluster_detail(self) -> str:
        row = await self.session.get(ClusterRow, 1)
        return row.detail if row else ""

    async def attempts_on(self, node_ids: Iterable[str]) -> Sequence[ExecutionRow]:
        query = select(ExecutionRow).where(col(ExecutionRow.node_id).in_(list(node_ids)), ExecutionRow.state != ENDED)
        return (await self.session.exec(query)).all()


def _gang_columns(order: StartOrder) -> dict[str, Any]:
    if order.gang is None:
        return {}
    node_ids = [peer.node_id for peer in order.gang.peers]
    return {"node_ids": node_ids, "first_port": order.gang.first_port, "key": order.gang.key}


# What a node's row and its picture in memory share, under the same names.
_SHARED = frozenset(field.name for field in fields(KnownNode)) & frozenset(NodeRow.model_fields) - {"runtimes"}


def node_row(node: KnownNode, seen_us: int) -> NodeRow:
    return NodeRow(**{name: getattr(node, name) for name in _SHARED}, runtimes=list(node.runtimes), seen_us=seen_us)


def known_node(row: NodeRow, now_s: float) -> KnownNode:
    """As heard and at work now, which errs on the safe side."""
    shared = {name: getattr(row, name) for name in _SHARED}
    return KnownNode(**shared, runtimes=tuple(row.runtimes), heard_s=now_s, busy_s=now_s)
