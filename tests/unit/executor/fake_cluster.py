"""A cluster in memory. It keeps every promise of the port that the cluster suite checks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from libs.common.clock import utc_now
from libs.common.contracts.messages import Execution
from libs.common.ids import new_id
from services.executor.ports import (
    AgentView,
    ClusterAway,
    NodeAway,
    NodeView,
    NoRoom,
    Part,
    Reservation,
    StartOrder,
)

NODE = "node1"
# What follows in the id of an execution is its rank.
ID_LENGTH = len(new_id("attempt"))


@dataclass
class FakeCluster:
    """One node of 4 CPUs and 2 GPUs, unless told otherwise.

    Args:
        away: why there is no cluster.
        deaf: nodes whose agent does not answer.
        mute: nodes whose agent can be looked at, and takes no order.
    """

    amounts: dict[str, float] = field(default_factory=lambda: {"CPU": 4.0, "memory": 8e9, "GPU": 2.0})
    alive: set[str] = field(default_factory=lambda: {NODE})
    away: str = ""
    deaf: set[str] = field(default_factory=set)
    mute: set[str] = field(default_factory=set)
    held: dict[str, Reservation] = field(default_factory=dict)
    waiting: dict[str, Reservation] = field(default_factory=dict)
    gpus: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    attempts: dict[tuple[str, str], Execution] = field(default_factory=dict)
    orders: list[StartOrder] = field(default_factory=list)
    barred: set[str] = field(default_factory=set)
    stops: list[tuple[str, str]] = field(default_factory=list)
    calls: int = 0
    isolation: str = "bwrap"
    runtimes: tuple[str, ...] = ()
    resting: frozenset[str] = frozenset()
    asked_for: list[list[dict[str, float]]] = field(default_factory=list)

    async def look(
        self, believed: Mapping[str, Mapping[str, str]], resting: Collection[str] = ()
    ) -> tuple[NodeView, ...]:
        self._check()
        self.resting = frozenset(resting)
        return tuple(self._node(node_id, believed.get(node_id, {})) for node_id in sorted(self.alive))

    async def reserve(self, wanted: Reservation) -> tuple[tuple[int, ...], ...]:
        self._check()
        for part in wanted.parts:
            if part.node_id not in self.alive:
                raise NodeAway(f"the node {part.node_id} is not among the living ones")
        if wanted.attempt_id not in self.held and not self._hold(wanted):
            self.waiting[wanted.attempt_id] = wanted
            raise NoRoom("the node is full")
        return self.gpus[wanted.attempt_id]

    async def release(self, attempt_id: str) -> None:
        self._check()
        self.held.pop(attempt_id, None)
        self.waiting.pop(attempt_id, None)

    async def reserved(self) -> frozenset[str]:
        self._check()
        return frozenset(self.held) | frozenset(self.waiting)

    async def start(self, node_id: str, order: StartOrder) -> None:
        self._check_agent(node_id)
        if (node_id, order.execution_id) in self.attempts:
            return
        self.orders.append(order)
        state = "ended" if order.execution_id in self.barred else "running"
        self.report(node_id, order.execution_id, state=state, reason="stopped" if state == "ended" else "")

    async def stop(self, node_id: str, execution_id: str, grace_s: float, reason: str) -> bool:
        self._check_agent(node_id)
        self.stops.append((execution_id, reason))
        if (node_id, execution_id) not in self.attempts:
            self.barred.add(execution_id)
            return False
        self.report(node_id, execution_id, state="ended", reason="stopped", detail=reason)
        return True

    async def drop(self, node_id: str, execution_id: str) -> None:
        self._check_agent(node_id)
        self.barred.discard(execution_id)
        known = self.attempts.get((node_id, execution_id))
        if known and known.state == "ended":
            del self.attempts[node_id, execution_id]

    async def held_order(self, node_id: str, attempt_id: str) -> StartOrder | None:
        self._check_agent(node_id)
        return next((order for order in self.orders if order.attempt_id == attempt_id), None)

    async def ask_for(self, bundles: Sequence[Mapping[str, float]]) -> None:
        self._check()
        self.asked_for.append([dict(bundle) for bundle in bundles])

    async def close(self) -> None:
        return

    def report(self, node_id: str, execution_id: str, **facts: object) -> Execution:
        """What the agent knows of an execution from now on."""
        attempt_id, rank = execution_id[:ID_LENGTH], execution_id[ID_LENGTH + 1 :]
        moment = {"started_at": utc_now(), "ended_at": utc_now() if facts.get("state") == "ended" else None}
        self.attempts[node_id, execution_id] = Execution.model_validate(
            {"attempt_id": attempt_id, "rank": int(rank or 0), "node_id": node_id} | moment | facts
        )
        return self.attempts[node_id, execution_id]

    def _hold(self, wanted: Reservation) -> bool:
        """All of it or nothing."""
        free = {part.node_id: dict(self.amounts) for part in wanted.parts}
        gpus = {node: list(range(int(self.amounts.get("GPU", 0)))) for node in free}
        for attempt_id, held in self.held.items():
            for part, indices in zip(held.parts, self.gpus[attempt_id], strict=True):
                if part.node_id in free:
                    _take(free[part.node_id], part)
                    gpus[part.node_id] = [index for index in gpus[part.node_id] if index not in indices]
        given = []
        for part in wanted.parts:
            if any(amount > free[part.node_id].get(name, 0.0) for name, amount in part.amounts.items()):
                return False
            _take(free[part.node_id], part)
            count, here = int(part.gpu_count), gpus[part.node_id]
            given.append(tuple(here[:count]))
            gpus[part.node_id] = here[count:]
        self.gpus[wanted.attempt_id] = tuple(given)
        self.held[wanted.attempt_id] = wanted
        self.waiting.pop(wanted.attempt_id, None)
        return True

    def _node(self, node_id: str, believed: Mapping[str, str]) -> NodeView:
        here = {attempt: seen for (node, attempt), seen in self.attempts.items() if node == node_id}
        news = tuple(
            seen
            for attempt, seen in here.items()
            if (seen.state != believed[attempt] if attempt in believed else seen.state != "ended")
        )
        agent = (
            None
            if node_id in self.deaf | self.resting
            else AgentView(self.isolation, "", frozenset(here), news, self.runtimes)
        )
        counts = self.amounts
        address = f"10.0.0.{sorted(self.alive).index(node_id) + 1}"
        memory_bytes = int(counts["memory"])
        return NodeView(node_id, "host", counts["CPU"], memory_bytes, counts["GPU"], address=address, agent=agent)

    def _check(self) -> None:
        self.calls += 1
        if self.away:
            raise ClusterAway(self.away)

    def _check_agent(self, node_id: str) -> None:
        self._check()
        if node_id in self.deaf | self.mute or node_id not in self.alive:
            raise ClusterAway(f"the agent of {node_id} does not answer")


def _take(free: dict[str, float], part: Part) -> None:
    for name, amount in part.amounts.items():
        free[name] = free.get(name, 0.0) - amount
