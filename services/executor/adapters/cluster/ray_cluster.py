"""The cluster port on Ray: node agents as detached actors, reservations as detached placement groups.

This is the asynchronous face of it: every call runs in a thread with a limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from services.executor.adapters.cluster.ray_connection import CONNECT_LIMIT_S, STOPPING, RayConnection
from services.executor.adapters.cluster.ray_nodes import RayNodes
from services.executor.adapters.cluster.ray_reservations import GPU_READ_LIMIT_S, RayReservations
from services.executor.ports import AgentConfig, ClusterAway, NodeView, Reservation, StartOrder

# One looks; others may still hang in calls to a head that died.
LOOKING = 4
CALLING = 16
RESERVING = 16
CALL_LIMIT_S = 10.0

P = ParamSpec("P")
T = TypeVar("T")


def connect(find_address: Callable[[], str], config: AgentConfig, namespace: str) -> RayCluster:
    """The cluster whose head is where `find_address` says, when there is one.

    Args:
        find_address: `host:port` of the head's GCS now, or an empty string when there is none yet.
        config: what each node's agent is told; agents that were told something else are replaced.
        namespace: Ray's, in which our agents and reservations have their names.
    """
    connection = RayConnection(find_address, namespace)
    nodes = RayNodes(connection, config, namespace)
    return RayCluster(connection, nodes, RayReservations(connection, nodes.is_alive))


class RayCluster:
    """One Ray cluster."""

    def __init__(self, connection: RayConnection, nodes: RayNodes, reservations: RayReservations) -> None:
        self._connection = connection
        self._nodes = nodes
        self._reservations = reservations
        # Apart from each other: reading GPUs may take a minute, and agents that hang hold up their callers.
        self._looking = ThreadPoolExecutor(LOOKING, thread_name_prefix="ray-look")
        self._calling = ThreadPoolExecutor(CALLING, thread_name_prefix="ray-call")
        self._reserving = ThreadPoolExecutor(RESERVING, thread_name_prefix="ray-reserve")
        self._closed = False

    async def look(
        self, believed: Mapping[str, Mapping[str, str]], resting: Collection[str] = ()
    ) -> tuple[NodeView, ...]:
        # Apart, so that a head that died is told of long before the patience with a new one is over.
        await self._in_thread(self._looking, CONNECT_LIMIT_S, self._connection.join)
        return await self._in_thread(self._looking, CALL_LIMIT_S, self._nodes.look, believed, resting)

    async def reserve(self, wanted: Reservation) -> tuple[tuple[int, ...], ...]:
        return await self._in_thread(
            self._reserving, GPU_READ_LIMIT_S + CALL_LIMIT_S, self._reservations.reserve, wanted
        )

    async def release(self, attempt_id: str) -> None:
        await self._in_thread(self._calling, CALL_LIMIT_S, self._reservations.release, attempt_id)

    async def reserved(self) -> frozenset[str]:
        return await self._in_thread(self._calling, CALL_LIMIT_S, self._reservations.reserved)

    async def start(self, node_id: str, order: StartOrder) -> None:
        await self._in_thread(self._calling, CALL_LIMIT_S, self._nodes.call, node_id, "start", order)

    async def stop(self, node_id: str, execution_id: str, grace_s: float, reason: str) -> bool:
        call = functools.partial(self._nodes.call, node_id, "stop", execution_id, grace_s, reason)
        return bool(await self._in_thread(self._calling, CALL_LIMIT_S, call))

    async def drop(self, node_id: str, execution_id: str) -> None:
        await self._in_thread(self._calling, CALL_LIMIT_S, self._nodes.call, node_id, "drop", execution_id)

    async def held_order(self, node_id: str, execution_id: str) -> StartOrder | None:
        call = functools.partial(self._nodes.call, node_id, "held_order", execution_id)
        found: StartOrder | None = await self._in_thread(self._calling, CALL_LIMIT_S, call)
        return found

    async def ask_for(self, bundles: Sequence[Mapping[str, float]]) -> None:
        await self._in_thread(self._calling, CALL_LIMIT_S, self._reservations.ask_for, bundles)

    async def close(self) -> None:
        """Leaves the cluster as it is: agents, reservations and jobs live on. Nothing is called after it."""
        with contextlib.suppress(ClusterAway, asyncio.CancelledError):
            await self._in_thread(self._looking, CALL_LIMIT_S, self._connection.leave)
        self._closed = True
        for threads in (self._looking, self._calling, self._reserving):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(
        self, threads: ThreadPoolExecutor, limit_s: float, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if self._closed:
            raise ClusterAway(STOPPING)
        call = functools.partial(work, *args, **kwargs)
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.get_running_loop().run_in_executor(threads, call)
        except TimeoutError:
            raise ClusterAway(f"the Ray cluster did not answer within {limit_s:.0f} s") from None
