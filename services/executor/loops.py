"""What the executor does by itself: it drives executions towards what was committed, and watches the nodes.

Both loops record first and act after, and every act can be repeated: a crash anywhere costs a repetition.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from libs.common.clock import to_us, utc_now
from libs.common.contracts.messages import Execution, NodesReported
from libs.common.faults import crash_point
from libs.common.ids import new_secret, secret_hash
from libs.common.store import Store
from libs.common.telemetry import meter, span
from services.executor.domain.execution import (
    ACCEPTED,
    ENDED,
    FINISHING,
    RESERVED,
    RUNNING,
    STARTING,
    amounts_for,
)
from services.executor.domain.inventory import GONE, READY, KnownNode, changed, next_inventory
from services.executor.handlers import advance, node_snapshot, take_report
from services.executor.ports import Cluster, ClusterAway, NodeAway, NodeView, NoRoom, Reservation, StartOrder
from services.executor.settings import ExecutorSettings
from services.executor.store import NEVER_US, ExecutionRow, ExecutorUnit, known_node, node_row

AT_ONCE = 32
STOP_GRACE_S = 15.0
# The inventory is sent this often even unchanged: it is the executor's sign of life.
REPORT_S = 5.0
# A start may be on its way to the agent this long before its absence there means anything.
ON_ITS_WAY_US = 30 * 1_000_000
PLATFORM_TEAM = "platform"

log = logging.getLogger(__name__)
ExecutorStore = Store[ExecutorUnit]

_nodes_gauge = meter().create_gauge("nabla_nodes_ready_count", description="Nodes that can take work")


class Driver:
    """Takes each due execution one step further: reserve, tell, stop, release, drop."""

    def __init__(self, store: ExecutorStore, cluster: Cluster, settings: ExecutorSettings) -> None:
        self._store = store
        self._cluster = cluster
        self._settings = settings
        self._woken = asyncio.Event()
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        try:
            while True:
                self._woken.clear()
                await self.look_for_work()
                await _wait_for(self._woken, min(1.0, self._settings.reconcile_s))
        finally:
            for task in self._busy.values():
                task.cancel()
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
            async with self._slots:
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
            await self._tell(row, *await self._store.run(lambda unit: self._prepare_order(unit, row.id)))
        else:
            await self._look_again(row, None)

    async def _reserve_and_tell(self, row: ExecutionRow) -> None:
        amounts = amounts_for(row.read_template().resources)
        try:
            gpus = await self._cluster.reserve(Reservation(row.id, row.node_id, amounts))
        except NodeAway as error:
            await self._end(row, "lost", f"it never started: {error}")
        except NoRoom as error:
            await self._wait_for_room(row, error)
        else:
            crash_point("executor.after_reserve")
            reserved, token, uid = await self._store.run(lambda unit: self._note_reserved(unit, row.id, gpus))
            await self._tell(reserved, token, uid)

    async def _note_reserved(
        self, unit: ExecutorUnit, attempt_id: str, gpus: Sequence[int]
    ) -> tuple[ExecutionRow, str, int]:
        row = await advance(unit, await _load(unit, attempt_id), "reserve", gpu_indices=list(gpus))
        return row, *await self._prepare_order(unit, attempt_id)

    async def _prepare_order(self, unit: ExecutorUnit, attempt_id: str) -> tuple[str, int]:
        """A fresh token, of which only the hash is kept, and the uid of the team."""
        row, token = await _load(unit, attempt_id), new_secret("nbla")
        await unit.keep_token(secret_hash(token), row.id)
        return token, self._settings.uid_base + await unit.team_number(row.team_id)

    async def _wait_for_room(self, row: ExecutionRow, error: NoRoom) -> None:
        waited_s = (to_us(utc_now()) - row.accepted_us) / 1_000_000
        if waited_s < self._settings.reserve_patience_s:
            await self._look_again(row, 0.0)
            return
        await self._end(row, "lost", f"it never started: {error}")

    async def _tell(self, row: ExecutionRow, token: str, uid: int) -> None:
        if row.stop_reason or row.state == ENDED:
            return
        await self._cluster.start(row.node_id, self._order(row, token, uid))
        crash_point("executor.after_tell")
        await self._store.run(lambda unit: self._note_told(unit, row.id))

    def _order(self, row: ExecutionRow, token: str, uid: int) -> StartOrder:
        return StartOrder(
            attempt_id=row.id,
            job_id=row.job_id,
            number=row.number,
            team_id=row.team_id,
            project_id=row.project_id,
            experiment_id=row.experiment_id,
            template=row.read_template(),
            token=token,
            team_uid=uid,
            gpu_indices=tuple(row.gpu_indices),
            traceparent=row.traceparent,
        )

    async def _note_told(self, unit: ExecutorUnit, attempt_id: str) -> None:
        row = await _load(unit, attempt_id)
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
        known = await self._cluster.stop(row.node_id, row.id, STOP_GRACE_S, row.stop_reason)
        if not known and row.state == RESERVED:
            await self._end(row, "stopped", row.stop_reason)
            return
        await self._look_again(row, self._settings.reconcile_s)

    async def _end(self, row: ExecutionRow, reason: str, detail: str) -> None:
        await end_execution(self._store, row.id, reason, detail)

    async def _clean_up(self, row: ExecutionRow) -> None:
        await self._cluster.release(row.id)
        keep_until_us = (row.ended_us or 0) + int(self._settings.keep_folder_s * 1_000_000)
        if not row.log_sealed or row.told_us is None:
            await self._visit_at(row, NEVER_US)
        elif to_us(utc_now()) < keep_until_us:
            await self._visit_at(row, keep_until_us)
        else:
            await self._drop(row)

    async def _drop(self, row: ExecutionRow) -> None:
        async with self._store.view() as view:
            present = {node.id for node in await view.nodes() if node.state != GONE}
        if row.node_id in present:
            await self._cluster.drop(row.node_id, row.id)
        await self._visit_at(row, NEVER_US)

    async def _look_again(self, row: ExecutionRow, after_s: float | None) -> None:
        at_us = NEVER_US if after_s is None else to_us(utc_now()) + int(after_s * 1_000_000)
        await self._visit_at(row, at_us)

    async def _visit_at(self, row: ExecutionRow, at_us: int) -> None:
        await self._store.run(lambda unit: unit.visit_again(row, at_us))


class Watcher:
    """Looks at the nodes, tells others, learns what reports did not bring, and gives up what is truly lost."""

    def __init__(
        self,
        store: ExecutorStore,
        cluster: Cluster,
        settings: ExecutorSettings,
        on_change: Callable[[], None],
        clock_s: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._settings = settings
        self._on_change = on_change
        self._clock_s = clock_s
        self._nodes: tuple[KnownNode, ...] = ()
        self._reported_s = float("-inf")
        self.detail = "the Ray cluster is still starting"

    async def run(self) -> None:
        await self.recall()
        while True:
            ready = await self.look()
            await asyncio.sleep(self._settings.look_s if ready else min(0.25, self._settings.look_s))

    async def recall(self) -> None:
        """Begins with the nodes known before a restart; each counts as heard now, which errs on the safe side."""
        async with self._store.view() as view:
            rows = await view.nodes()
        self._nodes = tuple(known_node(row, self._clock_s()) for row in rows)

    async def look(self) -> bool:
        """One pass; whether some node is ready."""
        believed = await self._believed()
        try:
            views = await self._cluster.look(believed)
            self.detail = "" if views else "no node of the Ray cluster is alive"
        except (ClusterAway, TimeoutError) as error:
            views, self.detail = (), str(error) or "the Ray cluster does not answer"
        now_s = self._clock_s()
        seen = {view.id: _known(view, now_s) for view in views}
        after = next_inventory(self._nodes, seen, now_s, self._settings.node_fence_s)
        for view in views:
            await self._learn(view)
        await self._give_up(after)
        await self._save(after, now_s)
        ready = sum(node.state == READY for node in after)
        _nodes_gauge.set(ready)
        return ready > 0

    async def _believed(self) -> dict[str, dict[str, str]]:
        async with self._store.view() as view:
            rows = await view.unfinished()
        believed: dict[str, dict[str, str]] = {}
        for row in rows:
            believed.setdefault(row.node_id, {})[row.id] = row.state
        return believed

    async def _learn(self, view: NodeView) -> None:
        """Applies what the agent knows better, and settles differences about which attempts there are."""
        if view.agent is None:
            return
        for report in view.agent.news:
            await self._store.run(partial(self._take, report=report))
        async with self._store.view() as unit:
            here = {row.id: row for row in await unit.attempts_on([view.id])}
            strays = [row for row in await unit.executions(view.agent.held - set(here)) if row.state == ENDED]
        for row in here.values():
            if row.id not in view.agent.held:
                await self._miss(row)
        for row in strays:
            if row.reason == "lost":
                await self._cluster.stop(view.id, row.id, 0.0, "the attempt was given up")

    async def _take(self, unit: ExecutorUnit, report: Execution) -> None:
        row = await unit.execution(report.attempt_id)
        if row:
            await take_report(unit, row, report)

    async def _miss(self, row: ExecutionRow) -> None:
        """The node's agent answers and has never heard of this attempt."""
        if row.told_us is None or to_us(utc_now()) - row.told_us < ON_ITS_WAY_US:
            return
        if row.state in (STARTING, RUNNING, FINISHING):
            detail = "its node no longer has its folder"
            await end_execution(self._store, row.id, "lost", detail)

    async def _give_up(self, nodes: Sequence[KnownNode]) -> None:
        gone = [node.id for node in nodes if node.state == GONE]
        if not gone:
            return
        async with self._store.view() as view:
            rows = await view.attempts_on(gone)
        for row in rows:
            detail = f"its node was out of contact for {self._settings.node_fence_s:.0f} s and more"
            await end_execution(self._store, row.id, "lost", detail)

    async def _save(self, nodes: Sequence[KnownNode], now_s: float) -> None:
        """Saves and sends the inventory when it changed or is due; a node that is gone is sent once, then forgotten."""
        differs = changed(self._nodes, nodes)
        if differs or now_s - self._reported_s >= REPORT_S:
            await self._store.run(lambda unit: self._report(unit, nodes))
            self._reported_s = now_s
        self._nodes = tuple(node for node in nodes if node.state != GONE)
        if differs:
            self._on_change()

    async def _report(self, unit: ExecutorUnit, nodes: Sequence[KnownNode]) -> None:
        detail = "" if any(node.state == READY for node in nodes) else self.detail
        await unit.save_nodes([node for node in nodes if node.state != GONE], detail)
        seen_us = to_us(unit.now)
        snapshots = tuple(node_snapshot(node_row(node, seen_us)) for node in nodes)
        await unit.emit(
            NodesReported(nodes=snapshots, detail=detail), team_id=PLATFORM_TEAM, object_id="inventory"
        )


async def end_execution(store: ExecutorStore, attempt_id: str, reason: str, detail: str) -> None:
    """Ends an execution that no agent will report the end of."""

    async def end(unit: ExecutorUnit) -> None:
        await advance(unit, await _load(unit, attempt_id), "end", reason=reason, detail=detail)

    await store.run(end)


async def _load(unit: ExecutorUnit, attempt_id: str) -> ExecutionRow:
    row = await unit.execution(attempt_id)
    assert row, "executions are never deleted"
    return row


def _known(view: NodeView, now_s: float) -> KnownNode:
    agent = view.agent
    return KnownNode(
        id=view.id,
        hostname=view.hostname,
        state=READY if agent else "silent",
        cpu_count=view.cpu_count,
        memory_bytes=view.memory_bytes,
        gpu_count=view.gpu_count,
        gpu_model=view.gpu_model,
        isolation=agent.isolation if agent else "",
        isolation_detail=agent.isolation_detail if agent else "",
        heard_s=now_s,
    )


async def _wait_for(event: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return
