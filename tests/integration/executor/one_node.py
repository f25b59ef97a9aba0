"""A cluster of one node without Ray: a real node agent in this process."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from services.executor.adapters.agent.node_agent import NodeAgent
from services.executor.ports import AgentConfig, NodeView, Reservation, StartOrder

NODE = "n" * 56


class OneNode:
    """Keeps the cluster port's promises for jobs that ask for little; what it reserves it only notes."""

    def __init__(self, config: AgentConfig) -> None:
        self._agent = NodeAgent(NODE, config, self._heard)
        self._held: set[str] = set()

    async def open(self) -> None:
        await self._agent.open()

    async def close(self) -> None:
        await self._agent.close()

    async def look(
        self, believed: Mapping[str, Mapping[str, str]], resting: Collection[str] = ()
    ) -> tuple[NodeView, ...]:
        view = await self._agent.look(believed.get(NODE, {}))
        return (NodeView(NODE, "this", cpu_count=4.0, memory_bytes=8_000_000_000, gpu_count=0.0, agent=view),)

    async def reserve(self, wanted: Reservation) -> tuple[tuple[int, ...], ...]:
        self._held.add(wanted.attempt_id)
        return ((),) * len(wanted.parts)

    async def release(self, attempt_id: str) -> None:
        self._held.discard(attempt_id)

    async def reserved(self) -> frozenset[str]:
        return frozenset(self._held)

    async def start(self, node_id: str, order: StartOrder) -> None:
        await self._agent.start(order)

    async def stop(self, node_id: str, execution_id: str, grace_s: float, reason: str) -> bool:
        return await self._agent.stop(execution_id, grace_s, reason)

    async def drop(self, node_id: str, execution_id: str) -> None:
        await self._agent.drop(execution_id)

    async def held_order(self, node_id: str, execution_id: str) -> StartOrder | None:
        return await self._agent.held_order(execution_id)

    async def ask_for(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Nothing more can come."""

    async def _heard(self) -> bool:
        return True
