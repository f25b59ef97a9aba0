"""Looks at the nodes, tells others, learns what reports did not bring, and gives up what is truly lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from libs.common.clock import to_us, utc_now
from libs.common.contracts.messages import Execution, NodesReported
from libs.common.errors import IllegalTransition
from libs.common.telemetry import meter
from services.executor.domain.execution import ENDED, FINISHING, RUNNING, STARTING
from services.executor.domain.inventory import (
    GONE,
    READY,
    RESTING,
    SILENT,
    KnownNode,
    changed,
    inventory_unasked,
    may_rest,
    next_inventory,
)
from services.executor.handlers import node_snapshot, take_report
from services.executor.loops.endings import ExecutorStore, end_execution
from services.executor.ports import AgentView, Cluster, ClusterAway, NodeView
from services.executor.settings import ExecutorSettings
from services.executor.store import NEVER_US, ExecutionRow, ExecutorUnit, Trace, known_node, node_row

# The inventory is sent this often even unchanged: it is the executor's sign of life.
REPORT_S = 5.0
# A start may be on its way to the agent this long before its absence there means anything.
ON_ITS_WAY_US = 30 * 1_000_000
FORGOTTEN_AT_ONCE = 20
PLATFORM_TEAM = "platform"

log = logging.getLogger(__name__)
_nodes_gauge = meter().create_gauge("nabla_nodes_ready_count", description="Nodes that can take work")


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a look goes by.

    Args:
        believed: node -> attempt -> state, of all that has not ended.
        draining: nodes that take no new work.
        resting: nodes that shall have no agent.
    """

    believed: Mapping[str, Mapping[str, str]]
    draining: frozenset[str]
    resting: frozenset[str]


class Watcher:
    """The inventory's one writer."""

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
        self._looked_s = float("-inf")
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
        self._looked_s = self._clock_s()
        self._nodes = tuple(known_node(row, self._looked_s) for row in rows)

    async def look(self) -> bool:
        """One pass; whether some node is ready."""
        plan = await self._plan()
        views = await self._ask_cluster(plan)
        now_s, fence_s = self._clock_s(), self._settings.node_fence_s
        if views is None:
            unseen = inventory_unasked(self._nodes, self._looked_s, now_s, fence_s)
            after = tuple(replace(node, draining=node.id in plan.draining) for node in unseen)
        else:
            before = {node.id: node for node in self._nodes}
            seen = {view.id: _known(view, plan, before.get(view.id), now_s) for view in views}
            after = next_inventory(self._nodes, seen, now_s, fence_s)
        self._looked_s = now_s
        for view in views or ():
            await self._learn(view)
        await self._give_up(after)
        await self._save(after, now_s)
        ready = sum(node.state == READY for node in after)
        _nodes_gauge.set(ready)
        return ready > 0

    async def _ask_cluster(self, plan: _Plan) -> tuple[NodeView, ...] | None:
        """The living nodes; None when the cluster's head does not answer."""
        try:
            views = await self._cluster.look(plan.believed, plan.resting)
        except (ClusterAway, TimeoutError) as error:
            self.detail = str(error) or "the Ray cluster does not answer"
            return None
        self.detail = "" if views else "no node of the Ray cluster is alive"
        return views

    async def _plan(self) -> _Plan:
        async with self._store.view() as view:
            unfinished, draining = await view.unfinished(), await view.draining()
            is_wanted = bool(await view.demand(to_us(utc_now())))
        believed: dict[str, dict[str, str]] = {}
        for execution_id, _, node_id, state in unfinished:
            believed.setdefault(node_id, {})[execution_id] = state
        wanted = {node.id for node in self._nodes} - draining if is_wanted else set()
        return _Plan(believed, draining, self._resting(draining, wanted | set(believed)))

    def _resting(self, draining: frozenset[str], waking: set[str]) -> frozenset[str]:
        """Which nodes shall have no agent.

        Args:
            waking: those with something to do. What waits for room may fit on a node that rests: all are woken then,
                and rest again when nothing comes of it.
        """
        idle_s = self._settings.autoscale_idle_s if self._settings.autoscale_limit else None
        now_s = self._clock_s()
        return frozenset(
            node.id
            for node in self._nodes
            if may_rest(
                replace(node, draining=node.id in draining),
                is_busy=node.id in waking or node.busy_s >= self._looked_s,
                now_s=now_s,
                idle_s=idle_s,
            )
        )

    async def _learn(self, view: NodeView) -> None:
        """Applies what the agent knows better, and settles differences about which attempts there are."""
        if view.agent is None:
            return
        for report in view.agent.news:
            await self._store.run(partial(self._take, report=report))
        async with self._store.view() as unit:
            here = {row.id: row for row in await unit.attempts_on([view.id])}
            others = view.agent.held - set(here)
            known = await unit.traces_of(others)
        for row in here.values():
            if row.id not in view.agent.held:
                await self._miss(row)
        for attempt_id, trace in known.items():
            await self._settle(view.id, attempt_id, trace)
        for attempt_id in sorted(others - set(known))[:FORGOTTEN_AT_ONCE]:
            await self._take_up(view.id, attempt_id)

    async def _settle(self, node_id: str, attempt_id: str, trace: Trace) -> None:
        """An attempt that its node holds, and that is over or said to be elsewhere."""
        if trace.state == ENDED and trace.reason == "lost":
            await self._stop_stray(node_id, attempt_id)
        if trace.state == ENDED and trace.may_go:
            await self._store.run(partial(self._drop_later, attempt_id=attempt_id, node_id=node_id))

    async def _take_up(self, node_id: str, attempt_id: str) -> None:
        """An attempt that this executor has never heard of: its database is older than the attempt.

        The order that the node was given makes its row again, so that it can be stopped, authenticated and reported;
        where it stands, the agent says at the next look.
        """
        try:
            order = await self._cluster.held_order(node_id, attempt_id)
        except (ClusterAway, TimeoutError) as error:
            log.warning(
                "a forgotten attempt is not taken up yet", extra={"attempt_id": attempt_id, "reason": str(error)}
            )
            return
        if order:
            log.warning("a forgotten attempt is taken up", extra={"attempt_id": attempt_id, "node_id": node_id})
            await self._store.run(lambda unit: unit.take_up(order, node_id))

    async def _drop_later(self, unit: ExecutorUnit, attempt_id: str, node_id: str) -> None:
        """The node was away when the folder was to go, or is here again under another id."""
        row = await unit.execution(attempt_id)
        if row and row.visit_us == NEVER_US:
            # A node that drains waits for nothing else.
            after_s = 0.0 if node_id in await unit.draining() else self._settings.revisit_s
            visit_us = to_us(unit.now) + int(after_s * 1_000_000)
            await unit.change(row, node_id=node_id, visit_us=visit_us)

    async def _stop_stray(self, node_id: str, attempt_id: str) -> None:
        """Ends what was given up and lives; told again at each look until its agent has heard it."""
        try:
            await self._cluster.stop(node_id, attempt_id, 0.0, "the attempt was given up")
        except (ClusterAway, TimeoutError) as error:
            log.warning("a stray is not stopped yet", extra={"attempt_id": attempt_id, "reason": str(error)})

    async def _take(self, unit: ExecutorUnit, report: Execution) -> None:
        row = await unit.of_rank(report.attempt_id, report.rank)
        if row is None:
            return
        try:
            await take_report(unit, row, report)
        except IllegalTransition as error:
            log.error("an agent tells what cannot be", extra={"attempt_id": row.id, "reason": str(error)})

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
        # A node that comes back does so under another id.
        await unit.undrain(node.id for node in nodes if node.state == GONE)
        seen_us = to_us(unit.now)
        snapshots = tuple(node_snapshot(node_row(node, seen_us)) for node in nodes)
        await unit.emit(NodesReported(nodes=snapshots, detail=detail), team_id=PLATFORM_TEAM, object_id="inventory")


def _known(view: NodeView, plan: _Plan, before: KnownNode | None, now_s: float) -> KnownNode:
    agent = view.agent or AgentView("", "")
    # Nobody knows what is on a node whose agent should answer and does not.
    is_busy = view.id in plan.believed or (bool(agent.held) if view.agent else view.id not in plan.resting)
    node = KnownNode(
        id=view.id,
        hostname=view.hostname,
        state=RESTING if view.id in plan.resting else READY if view.agent else SILENT,
        cpu_count=view.cpu_count,
        memory_bytes=view.memory_bytes,
        gpu_count=view.gpu_count,
        gpu_model=view.gpu_model or agent.gpu_model,
        gpu_memory_bytes=view.gpu_memory_bytes or agent.gpu_memory_bytes,
        isolation=agent.isolation,
        isolation_detail=agent.isolation_detail,
        address=view.address,
        runtimes=agent.runtimes,
        network=agent.network,
        door=agent.door,
        draining=view.id in plan.draining,
        is_head=view.is_head,
        heard_s=now_s,
        busy_s=now_s if is_busy or before is None else before.busy_s,
    )
    return node if view.agent or before is None else _as_last_told(node, before)


def _as_last_told(node: KnownNode, before: KnownNode) -> KnownNode:
    """What an agent said once holds while there is none: people and machine types see the node as it will be."""
    return replace(
        node,
        gpu_model=node.gpu_model or before.gpu_model,
        gpu_memory_bytes=node.gpu_memory_bytes or before.gpu_memory_bytes,
        isolation=before.isolation,
        isolation_detail=before.isolation_detail,
        runtimes=before.runtimes,
        network=before.network,
    )
