"""Takes each due execution one step further."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from libs.common.clock import to_us, utc_now
from libs.common.contracts.gangs import rank_template, ranks_of
from libs.common.faults import crash_point
from libs.common.ids import new_secret, secret_hash
from libs.common.telemetry import span
from libs.common.waiting import end, happens
from services.executor.domain.execution import ACCEPTED, ENDED, RESERVED, amounts_for
from services.executor.domain.gang import BLOCKS, free_block, gang_order, missing_addresses
from services.executor.domain.gpus import Use, free_gpus, share_of
from services.executor.domain.inventory import GONE, READY
from services.executor.domain.isolation import PROCESS, refusal
from services.executor.handlers import advance
from services.executor.loops.endings import ExecutorStore, end_execution, load
from services.executor.ports import Cluster, ClusterAway, NodeAway, NoRoom, Part, Reservation, StartOrder
from services.executor.settings import ExecutorSettings
from services.executor.store import NEVER_US, ExecutionRow, ExecutorUnit

AT_ONCE = 32
# Stops have places of their own: reservations may take a minute each, and people wait for a stop.
STOPS_AT_ONCE = 16
STOP_GRACE_S = 15.0
ENGINES = {"podman", "docker"}

log = logging.getLogger(__name__)


class Driver:
    """Takes each due execution one step further: reserve, tell, stop, release, drop."""

    def __init__(self, store: ExecutorStore, cluster: Cluster, settings: ExecutorSettings) -> None:
        self._store = store
        self._cluster = cluster
        self._settings = settings
        self._woken = asyncio.Event()
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._stop_slots = asyncio.Semaphore(STOPS_AT_ONCE)

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        try:
            while True:
                self._woken.clear()
                await self.look_for_work()
                await happens(self._woken, min(1.0, self._settings.reconcile_s))
        finally:
            await end(tuple(self._busy.values()), again_s=1.0)
            await self._cluster.close()

    async def look_for_work(self) -> None:
        """Begins a visit to every due execution that has none under way."""
        async with self._store.view() as view:
            due = await view.due()
        for row in due:
            if row.id not in self._busy:
                self._busy[row.id] = asyncio.create_task(self._visit(row))

    async def settle(self) -> None:
        """Waits for the visits under way."""
        while self._busy:
            await asyncio.gather(*self._busy.values())

    async def _visit(self, row: ExecutionRow) -> None:
        try:
            async with self._stop_slots if row.stop_reason and row.state != ENDED else self._slots:
                with span("drive execution", row.traceparent, object=row.id, state=row.state):
                    await self._step(row)
        except (ClusterAway, TimeoutError) as error:
            log.info("execution waits", extra={"attempt_id": row.id, "reason": str(error)})
            await self._look_again(row, self._settings.reconcile_s)
        except Exception:
            log.exception("execution is looked at again", extra={"attempt_id": row.id})
            await self._look_again(row, self._settings.reconcile_s)
        finally:
            del self._busy[row.id]
            self._woken.set()

    async def _step(self, row: ExecutionRow) -> None:
        if row.state == ENDED:
            await self._clean_up(row)
        elif row.stop_reason:
            await self._stop(row)
        elif row.state == ACCEPTED:
            await self._reserve_and_tell(row)
        elif row.state == RESERVED:
            # Somebody crashed between reserving and noting that the agent was told: a new token, and again.
            await self._tell(row, await self._store.run(lambda unit: self._prepare_order(unit, row.id)))
        else:
            await self._look_again(row, None)

    async def _reserve_and_tell(self, row: ExecutionRow) -> None:
        if forbidden := await self._refusal(row):
            await self._end(row, "refused", forbidden)
            return
        crash_point("executor.before_reserve")
        try:
            if row.gang:
                await self._store.run(lambda unit: _take_ports(unit, row.attempt_id))
            gpus = await self._cluster.reserve(reservation_of(row))
        except NodeAway as error:
            await self._leave_node(row, error)
        except NoRoom as error:
            await self._wait_for_room(row, error)
        else:
            crash_point("executor.after_reserve")
            await self._tell_reserved(row, gpus)

    async def _tell_reserved(self, row: ExecutionRow, gpus: Sequence[Sequence[int]]) -> None:
        try:
            reserved, order = await self._store.run(lambda unit: self._note_reserved(unit, row, gpus))
        except NoRoom as error:
            await self._wait_for_room(row, error)
            return
        crash_point("executor.before_tell")
        await self._tell(reserved, order)

    async def _refusal(self, row: ExecutionRow) -> str:
        """Why the job may not run on its nodes as they are, or nothing."""
        in_images = _in_images(row)
        async with self._store.view() as view:
            # An engine's containers have walls of their own; an unpacked image has the node's.
            classes = {
                node.isolation
                for node in await view.nodes()
                if node.id in in_images and not (in_images[node.id] and set(node.runtimes) & ENGINES)
            }
        if PROCESS not in classes:
            return ""
        number = await self._store.run(lambda unit: unit.team_number(row.team_id))
        return refusal(PROCESS, self._settings.host, number)

    async def _note_reserved(
        self, unit: ExecutorUnit, lead: ExecutionRow, gpus: Sequence[Sequence[int]]
    ) -> tuple[ExecutionRow, StartOrder]:
        """Of all ranks at once: the others are due from now on.

        Raises:
            NoRoom: GPUs that Ray counts as free are used.
        """
        rows = await unit.of_attempts([lead.attempt_id])
        for row, indices in zip(rows, await _unused_gpus(unit, rows, gpus), strict=True):
            reserved = await advance(unit, row, "reserve", gpu_indices=list(indices), detail="", visit_us=0)
            if row.id == lead.id:
                lead = reserved
        return lead, await self._prepare_order(unit, lead.id)

    async def _prepare_order(self, unit: ExecutorUnit, execution_id: str) -> StartOrder:
        """With a fresh token, of which only the hash is kept, and the uid of the team."""
        row, token = await load(unit, execution_id), new_secret("nbla")
        await unit.keep_token(secret_hash(token), row.id)
        uid = self._settings.uid_base + await unit.team_number(row.team_id)
        template = row.read_template()
        ranks, gang = ranks_of(template), row.read_gang()
        return StartOrder(
            attempt_id=row.attempt_id,
            job_id=row.job_id,
            number=row.number,
            team_id=row.team_id,
            project_id=row.project_id,
            experiment_id=row.experiment_id,
            template=rank_template(template, ranks[row.rank]),
            token=token,
            team_uid=uid,
            gpu_indices=tuple(row.gpu_indices),
            traceparent=row.traceparent,
            gang=gang_order(template.gang.type, gang, ranks, row.rank, await _addresses(unit)) if gang else None,
        )

    async def _leave_node(self, row: ExecutionRow, error: NodeAway) -> None:
        """Not before the inventory says so too: whoever goes by it would choose the same node for the next attempt."""
        gang = row.read_gang()
        wanted = set(gang.node_ids) if gang else {row.node_id}
        async with self._store.view() as view:
            ready = {node.id for node in await view.nodes() if node.state == READY}
        if wanted <= ready and self._waited_s(row) < self._settings.reserve_patience_s:
            await self._look_again(row, self._settings.look_s)
        else:
            await self._end(row, "lost", f"it never started: {error}")

    async def _wait_for_room(self, row: ExecutionRow, error: NoRoom) -> None:
        if self._waited_s(row) < self._settings.reserve_patience_s:
            await self._store.run(lambda unit: self._note_waiting(unit, row.id, str(error)))
            return
        await self._end(row, "lost", f"it never started: {error}")

    def _waited_s(self, row: ExecutionRow) -> float:
        return (to_us(utc_now()) - row.accepted_us) / 1_000_000

    async def _note_waiting(self, unit: ExecutorUnit, execution_id: str, why: str) -> None:
        """Keeps why it does not start yet, for who asks; it is due again, after those that were due before."""
        row = await load(unit, execution_id)
        if row.state == ACCEPTED and row.detail != why:
            row = await unit.change(row, detail=why)
        await unit.visit_again(row, to_us(utc_now()))

    async def _tell(self, row: ExecutionRow, order: StartOrder) -> None:
        if row.stop_reason or row.state == ENDED:
            return
        await self._cluster.start(row.node_id, order)
        crash_point("executor.after_tell")
        await self._store.run(lambda unit: self._note_told(unit, row.id))

    async def _note_told(self, unit: ExecutorUnit, execution_id: str) -> None:
        row = await load(unit, execution_id)
        if row.state == ENDED:
            return
        visit_us = 0 if row.stop_reason else NEVER_US
        if row.state == RESERVED:
            await advance(unit, row, "tell", told_us=to_us(unit.now), visit_us=visit_us)
        else:
            await unit.change(row, told_us=to_us(unit.now), visit_us=visit_us)

    async def _stop(self, row: ExecutionRow) -> None:
        if row.state == ACCEPTED:
            await self._end(row, "stopped", row.stop_reason)
            return
        crash_point("executor.before_stop")
        known = await self._cluster.stop(row.node_id, row.id, STOP_GRACE_S, row.stop_reason)
        crash_point("executor.after_stop")
        if not known and row.state == RESERVED:
            await self._end(row, "stopped", row.stop_reason)
            return
        await self._look_again(row, self._settings.reconcile_s)

    async def _end(self, row: ExecutionRow, reason: str, detail: str) -> None:
        await end_execution(self._store, row.id, reason, detail)

    async def _clean_up(self, row: ExecutionRow) -> None:
        async with self._store.view() as view:
            is_over = all(each.state == ENDED for each in await view.of_attempts([row.attempt_id]))
        if is_over:
            crash_point("executor.before_release")
            await self._cluster.release(row.attempt_id)
            crash_point("executor.after_release")
        keep_until_us = (row.ended_us or 0) + int(await self._keep_folder_s(row.node_id) * 1_000_000)
        if not row.log_sealed:
            await self._visit_at(row, NEVER_US)
        elif to_us(utc_now()) < keep_until_us:
            await self._visit_at(row, keep_until_us)
        else:
            await self._drop(row)

    async def _keep_folder_s(self, node_id: str) -> float:
        """A node that drains shall have nothing left: what is in the object store goes at once."""
        async with self._store.view() as view:
            return 0.0 if node_id in await view.draining() else self._settings.keep_folder_s

    async def _drop(self, row: ExecutionRow) -> None:
        """A folder that is still there afterwards is listed by its node's agent, and dropped later."""
        async with self._store.view() as view:
            present = {node.id for node in await view.nodes() if node.state != GONE}
        if row.node_id in present:
            crash_point("executor.before_drop")
            await self._cluster.drop(row.node_id, row.id)
            crash_point("executor.after_drop")
        await self._visit_at(row, NEVER_US)

    async def _look_again(self, row: ExecutionRow, after_s: float | None) -> None:
        at_us = NEVER_US if after_s is None else to_us(utc_now()) + int(after_s * 1_000_000)
        await self._visit_at(row, at_us)

    async def _visit_at(self, row: ExecutionRow, at_us: int) -> None:
        await self._store.run(lambda unit: unit.visit_again(row, at_us))


def _in_images(row: ExecutionRow) -> dict[str, bool]:
    """Of each node of the attempt, whether all that runs there of it runs in container images."""
    template, gang = row.read_template(), row.read_gang()
    nodes = gang.node_ids if gang else (row.node_id,)
    found: dict[str, bool] = {}
    for node_id, rank in zip(nodes, ranks_of(template), strict=True):
        found[node_id] = found.get(node_id, True) and bool(rank_template(template, rank).container.image)
    return found


def reservation_of(row: ExecutionRow) -> Reservation:
    """What the attempt of this row holds, with all its ranks."""
    template, gang = row.read_template(), row.read_gang()
    nodes = gang.node_ids if gang else (row.node_id,)
    wishes = [rank_template(template, rank).resources for rank in ranks_of(template)]
    parts = (Part(node_id, amounts_for(wish)) for node_id, wish in zip(nodes, wishes, strict=True))
    return Reservation(row.attempt_id, tuple(parts))


async def _unused_gpus(
    unit: ExecutorUnit, rows: Sequence[ExecutionRow], given: Sequence[Sequence[int]]
) -> Sequence[Sequence[int]]:
    """Ray's, or others where what runs is on them."""
    if not any(given):
        return given
    attempt_id, parts = rows[0].attempt_id, reservation_of(rows[0]).parts
    wanted = [Use(part.node_id, indices, share_of(part.gpu_count)) for part, indices in zip(parts, given, strict=True)]
    nodes = {use.node_id for use in wanted}
    used = [
        Use(row.node_id, row.gpu_indices, share_of(reservation_of(row).parts[row.rank].gpu_count))
        for row in await unit.gpu_users(nodes)
        if row.attempt_id != attempt_id
    ]
    counts = {node.id: int(node.gpu_count) for node in await unit.nodes()}
    found = free_gpus([use for use in wanted if use.indices], used, counts)
    if found is None:
        raise NoRoom("GPUs that Ray counts as free are used by what runs since before its head was lost")
    settled = iter(found)
    return [next(settled) if use.indices else () for use in wanted]


async def _take_ports(unit: ExecutorUnit, attempt_id: str) -> None:
    """Gives a gang its ports, once.

    Raises:
        NoRoom: the other gangs on its nodes have all of them, or a node of it is not known well enough yet.
    """
    rows = await unit.of_attempts([attempt_id])
    gang = rows[0].read_gang()
    if gang is None or gang.first_port:
        return
    if missing := missing_addresses(gang, await _addresses(unit)):
        raise NoRoom(f"nobody knows the address of the node {missing[0][:12]} yet, where other ranks would find it")
    first_port = free_block(await unit.ports_taken(gang.node_ids))
    if not first_port:
        raise NoRoom(f"its nodes have {BLOCKS} gangs, and no ports left for one more")
    for row in rows:
        await unit.change(row, gang=row.gang | {"first_port": first_port})


async def _addresses(unit: ExecutorUnit) -> dict[str, str]:
    return {node.id: node.address for node in await unit.nodes()}
