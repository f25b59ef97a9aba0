"""One function per message. None of them waits for anything outside: the loops do the work that is left to do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from libs.common.clock import from_us, to_us
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    AdmitNode,
    AuthenticateAttempt,
    CheckNodeToken,
    CreateNodeToken,
    DemandChanged,
    Door,
    DoorOpened,
    DrainNode,
    Execution,
    ExecutionEnded,
    ExecutionFinishing,
    ExecutionPage,
    ExecutionRunning,
    FrontDoorPass,
    GetFrontDoorPass,
    JobTemplate,
    ListExecutions,
    ListNodes,
    LogSealed,
    Node,
    NodeGrant,
    NodePage,
    NodeToken,
    OpenDoor,
    ReportExecution,
    Resources,
    StartExecution,
    StopExecution,
)
from libs.common.errors import Conflict, Invalid, NotFound, Unauthenticated
from libs.common.ids import new_secret
from libs.common.telemetry import meter
from services.executor.domain.admission import TICKET_LIFE, is_good, why_closed
from services.executor.domain.doors import SSH, DoorTicket, why_not
from services.executor.domain.execution import (
    ENDED,
    FINISHING,
    RUNNING,
    TABLE,
    TRIGGER_OF_REPORT,
    amounts_for,
    facts_of,
    short_reason,
)
from services.executor.domain.gang import execution_ids
from services.executor.ports import Authority, DoorTickets, Ticket
from services.executor.store import NEVER_US, ExecutionRow, ExecutorUnit, NodeRow, NodeTokenRow

log = logging.getLogger(__name__)

OPEN_CLUSTER = "Set node_address in nabla.toml to an address of this machine, or ray_address to a cluster on a network."
_EVENT_OF_STATE = {RUNNING: ExecutionRunning, FINISHING: ExecutionFinishing, ENDED: ExecutionEnded}
_ended = meter().create_counter("nabla_executions_ended_total", description="Ended executions, by reason")
_start_latency = meter().create_histogram(
    "nabla_execution_start_seconds", unit="s", description="From accepted to the command's start"
)


async def accept_execution(message: StartExecution, unit: ExecutorUnit, call: Envelope) -> None:
    """Commits the intent; the driving loop reserves and starts. Known already: nothing happens."""
    known = await unit.of_rank(message.attempt_id, 0)
    if known:
        if known.job_id != message.job_id or known.number != message.number:
            detail = f"attempt {message.attempt_id} is number {known.number} of job {known.job_id}."
            raise Conflict("attempt_differs", detail, "Give each attempt an id of its own.")
        return
    gang = _gang_facts(message)
    nodes = gang["node_ids"] if gang else [message.node_id]
    for id_, (rank, node_id) in zip(
        execution_ids(message.attempt_id, len(nodes), is_gang=bool(gang)), enumerate(nodes), strict=True
    ):
        unit.session.add(
            ExecutionRow(
                id=id_,
                attempt_id=message.attempt_id,
                rank=rank,
                gang=gang,
                job_id=message.job_id,
                number=message.number,
                team_id=call.team_id,
                project_id=message.project_id,
                experiment_id=message.experiment_id,
                node_id=node_id,
                template=message.template.to_wire().decode(),
                traceparent=call.traceparent,
                accepted_us=to_us(unit.now),
                # Rank 0 reserves for all; the others are due when it has.
                visit_us=NEVER_US if rank else 0,
            )
        )


def _gang_facts(message: StartExecution) -> dict[str, Any]:
    """What the ranks of a gang have in common, without ports yet; empty for a job of one process."""
    if not message.seats:
        return {}
    node_ids = [seat.node_id for seat in sorted(message.seats, key=lambda seat: seat.rank)]
    return {"node_ids": node_ids, "first_port": 0, "key": new_secret("nblg")}


async def stop_execution(message: StopExecution, unit: ExecutorUnit, call: Envelope) -> None:
    """Records the wish for every rank that has not ended; the loop repeats it until all have.

    A stop may overtake its start, so one for an attempt unknown here leaves nothing: the scheduler repeats it.
    """
    for row in await unit.of_attempts([message.attempt_id]):
        if row.state != ENDED:
            reason = row.stop_reason or short_reason(message.reason) or "stopped"
            await unit.change(row, stop_reason=reason, visit_us=0)


async def apply_report(message: ReportExecution, unit: ExecutorUnit, call: Envelope) -> None:
    """Moves the execution to what a node agent saw."""
    row = await unit.of_rank(message.execution.attempt_id, message.execution.rank)
    if row is None:
        log.warning("report of an unknown attempt", extra={"attempt_id": message.execution.attempt_id})
        return
    await take_report(unit, row, message.execution)


async def take_report(unit: ExecutorUnit, row: ExecutionRow, report: Execution) -> None:
    """The same for a report that came by another way than the bus."""
    trigger = TRIGGER_OF_REPORT.get(report.state)
    if trigger:
        await advance(unit, row, trigger, **facts_of(report))


async def advance(unit: ExecutorUnit, row: ExecutionRow, trigger: str, **values: Any) -> ExecutionRow:
    """The one way to move an execution: checks the table, saves, and emits when others must know.

    A move that was made already only saves a new node: its agent may have been re-made under another id.
    """
    state = TABLE.next_state(row.id, row.state, trigger)
    if state == row.state:
        node_id = values.get("node_id", row.node_id)
        moved = state != ENDED and node_id != row.node_id
        return await unit.change(row, node_id=node_id) if moved else row
    if state == ENDED:
        values = {"ended_us": to_us(unit.now), "visit_us": 0, "asked_us": to_us(unit.now)} | values
    changed = await unit.change(row, state=state, **values)
    if state == ENDED:
        await unit.forget_tokens([row.id])
    await _tell_others(unit, changed)
    return changed


async def _tell_others(unit: ExecutorUnit, row: ExecutionRow) -> None:
    event = _EVENT_OF_STATE.get(row.state)
    if event is None:
        return
    if row.state == ENDED:
        _ended.add(1, {"reason": row.reason})
    elif row.state == RUNNING and row.started_us:
        _start_latency.record((row.started_us - row.accepted_us) / 1_000_000)
    await unit.emit(
        event(execution=row.snapshot()),
        team_id=row.team_id,
        project_id=row.project_id,
        object_id=row.attempt_id,
        revision=row.revision,
        attempt=row.number,
    )


async def note_sealed_log(message: LogSealed, unit: ExecutorUnit, call: Envelope) -> None:
    """The log is in object storage: the folders of the job's attempts may go from their nodes."""
    for row in await unit.executions_of_job(message.job_id):
        if row.state == ENDED and not row.log_sealed:
            await unit.change(row, log_sealed=True, visit_us=0)


async def list_executions(message: ListExecutions, unit: ExecutorUnit, call: Envelope) -> ExecutionPage:
    rows = await unit.of_attempts(message.attempt_ids[:500])
    return ExecutionPage(items=tuple(row.snapshot() for row in rows if row.team_id == call.principal.team_id))


async def authenticate_attempt(message: AuthenticateAttempt, unit: ExecutorUnit, call: Envelope) -> Execution:
    row = await unit.execution_of_token(message.token_hash)
    if row is None or row.state == ENDED:
        raise Unauthenticated("token_invalid", "The token is not one of a running attempt.")
    return row.snapshot()


class Doors:
    """Lets people into running jobs, and the front door to their nodes."""

    def __init__(self, tickets: DoorTickets, authority: Authority) -> None:
        self._tickets = tickets
        self._authority = authority

    async def sign_front_door(self, message: GetFrontDoorPass, _unit: ExecutorUnit, _call: Envelope) -> FrontDoorPass:
        try:
            certificate = self._authority.of_front_door(message.public_key)
        except ValueError as error:
            raise Invalid("bad_key", f"{error}.", "Send an Ed25519 public key in PEM.", field="public_key") from None
        return FrontDoorPass(certificate=certificate, authority=self._authority.certificate)

    async def open_door(self, message: OpenDoor, unit: ExecutorUnit, call: Envelope) -> Door:
        field, detail, remedy = why_not(message.kind, message.port, message.public_key)
        if field:
            raise Invalid("bad_door", detail, remedy, field=field)
        row = await _running_execution(unit, message, call.principal.team_id)
        node = next((node for node in await unit.nodes() if node.id == row.node_id), None)
        if node is None or not node.door:
            detail = f"The node of job {row.job_id} is out of contact, so nobody can enter."
            raise Conflict("node_away", detail, "`nabla nodes list` shows it; try again when it is back.")
        public_key = message.public_key.strip() if message.kind == SSH else ""
        ticket = DoorTicket(row.id, message.kind, message.port, public_key, call.principal.id)
        opened = DoorOpened(
            job_id=row.job_id,
            attempt_id=row.attempt_id,
            rank=row.rank,
            kind=message.kind,
            port=message.port,
            by=call.principal.id,
        )
        await unit.emit(opened, team_id=row.team_id, project_id=row.project_id, object_id=row.id, attempt=row.number)
        return Door(
            path=f"/n/{row.node_id}/enter",
            ticket=self._tickets.issue(ticket),
            expires_at=unit.now + timedelta(seconds=self._tickets.hold_s),
            host_key=self._tickets.host_key_line(row.id),
            job_id=row.job_id,
            attempt_id=row.attempt_id,
        )


async def _running_execution(unit: ExecutorUnit, message: OpenDoor, team_id: str) -> ExecutionRow:
    job_id, rank = message.job_id, message.rank
    executions = await unit.executions_of_job(job_id)
    rows = [row for row in executions if row.team_id == team_id and row.rank == rank]
    if not rows:
        of_rank = f" with a rank {rank}" if rank else ""
        detail = f"No job {job_id[:60]}{of_rank} has run yet."
        raise NotFound("job_not_found", detail, "See `nabla jobs list --state running`.")
    newest = max(rows, key=lambda row: row.number)
    if newest.state != RUNNING:
        detail = f"Job {job_id} is not running now (its attempt {newest.number} is {newest.state})."
        raise Conflict("job_not_running", detail, "See `nabla jobs get`.")
    return newest


async def list_nodes(message: ListNodes, unit: ExecutorUnit, call: Envelope) -> NodePage:
    """With what attempts hold of each node, of all teams; whose they are is told of the asking team's alone."""
    held: dict[str, list[tuple[str, Resources]]] = {}
    for node_id, team_id, job_id, template in await unit.holders():
        shown = job_id if team_id == call.principal.team_id else ""
        held.setdefault(node_id, []).append((shown, JobTemplate.from_wire(template.encode()).resources))
    nodes = tuple(_with_use(node_snapshot(row), held.get(row.id, ())) for row in await unit.nodes())
    return NodePage(items=nodes, detail=await unit.cluster_detail())


def _with_use(node: Node, held: Sequence[tuple[str, Resources]]) -> Node:
    amounts = [amounts_for(resources) for _, resources in held]
    return node.model_copy(
        update={
            "cpu_used": sum(each["CPU"] for each in amounts),
            "memory_used_bytes": int(sum(each.get("memory", 0) for each in amounts)),
            "gpu_used": sum(each.get("GPU", 0) for each in amounts),
            "attempt_count": len(held),
            "job_ids": tuple(sorted({job_id for job_id, _ in held if job_id})),
        }
    )


async def learn_demand(message: DemandChanged, unit: ExecutorUnit, call: Envelope) -> None:
    """The whole of it, each time; the scaler asks for it."""
    await unit.keep_demand(message.demands)


async def drain_node(message: DrainNode, unit: ExecutorUnit, call: Envelope) -> Node:
    """Commits the wish; the watcher tells it to others at its next look, and lets the node rest when it is idle."""
    row = await unit.node(message.node_id)
    if row is None:
        raise NotFound("node_not_found", f"There is no node {message.node_id}.", "`nabla nodes list` shows them.")
    if message.undo:
        await unit.undrain([row.id])
    else:
        await unit.drain(row.id)
        await unit.hasten(row.id)
    return node_snapshot(row).model_copy(update={"draining": not message.undo})


async def invite_node(message: CreateNodeToken, unit: ExecutorUnit, call: Envelope) -> NodeToken:
    """Keeps the hash of a new ticket; those that are over go on the way."""
    ticket = _ticket(call)
    if closed := why_closed(ticket.address):
        raise Conflict("cluster_closed", f"No machine can join: {closed}.", OPEN_CLUSTER)
    expires_at = unit.now + TICKET_LIFE
    await unit.keep_node_token(message.token_hash, to_us(expires_at))
    return _node_token(ticket, expires_at)


async def authenticate_node(message: CheckNodeToken, unit: ExecutorUnit, call: Envelope) -> NodeToken:
    row = await _good_ticket(unit, message.token_hash)
    return _node_token(_ticket(call), from_us(row.expires_us))


async def admit_node(message: AdmitNode, unit: ExecutorUnit, call: Envelope) -> NodeGrant:
    """Uses the ticket up. A repeat of the same request is answered from the first one's record."""
    row = await _good_ticket(unit, message.token_hash)
    row.used_us, row.hostname = to_us(unit.now), message.hostname[:255]
    unit.session.add(row)
    ticket = _ticket(call)
    return NodeGrant(ray_address=ticket.address, ray_token=ticket.token)


async def _good_ticket(unit: ExecutorUnit, token_hash: str) -> NodeTokenRow:
    row = await unit.node_token(token_hash)
    if row is None or not is_good(row.expires_us, row.used_us, to_us(unit.now)):
        detail = "This node token is not one, was used already, or is too old."
        raise Unauthenticated("node_token_invalid", detail, "`nabla node token` makes a new one.")
    return row


def _ticket(call: Envelope) -> Ticket:
    assert isinstance(call.facts, Ticket)
    return call.facts


def _node_token(ticket: Ticket, expires_at: datetime) -> NodeToken:
    return NodeToken(expires_at=expires_at, python_version=ticket.python_version, ray_version=ticket.ray_version)


def node_snapshot(row: NodeRow) -> Node:
    return Node(
        id=row.id,
        hostname=row.hostname,
        state=row.state,
        cpu_count=row.cpu_count,
        memory_bytes=row.memory_bytes,
        gpu_count=row.gpu_count,
        gpu_model=row.gpu_model,
        isolation=row.isolation,
        isolation_detail=row.isolation_detail,
        gpu_memory_bytes=row.gpu_memory_bytes,
        address=row.address,
        runtimes=tuple(row.runtimes),
        network=row.network,
        door=row.door,
        draining=row.draining,
        seen_at=from_us(row.seen_us),
    )
