"""The cluster port on Ray: node agents as detached actors, reservations as detached placement groups.

Ray blocks, may come up later than the executor, and dials a dead head for minutes. So every call runs in a thread
with a limit, nothing is called before a quick look at the head's port, and a connection whose head went away is
shut down and made again, once no call is under way: a shutdown beneath a call is a segmentation fault (measured).
A call that was under way when the head died hangs until there is one again, and after a minute Ray ends this
process; its supervisor starts it again from its database.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from services.executor.adapters.loopback import keep_loopback
from services.executor.adapters.ray_agent import RayNodeAgent, fingerprint
from services.executor.domain.execution import short_reason
from services.executor.ports import (
    AgentConfig,
    AgentView,
    ClusterAway,
    NodeAway,
    NodeView,
    NoRoom,
    Reservation,
    StartOrder,
)

AGENT_PREFIX = "nabla-agent-"
# One looks; others may still hang in calls to a head that died.
LOOKING = 4
CALLING = 16
RESERVING = 16
PORT_ANSWERS_S = 1.0
CONNECT_LIMIT_S = 30.0
CALL_LIMIT_S = 10.0
AGENT_ANSWERS_S = 4.0
ROOM_WAIT_S = 1.0
GPU_READ_LIMIT_S = 60.0
SWEEP_S = 30.0
# Longer than calls to agents take; those to a dead head may hang for a minute, and are not waited for.
CALLS_END_S = 9.0
STARTING = "the Ray cluster is still starting"
STOPPING = "the executor is stopping"
_ROOT = str(Path(__file__).resolve().parents[3])
_NODE_LABEL = "ray.io/node-id"

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class RayCluster:
    """One Ray cluster.

    Args:
        find_address: `host:port` of the head's GCS now, or an empty string when there is none yet.
        config: what each node's agent is told; agents that were told something else are replaced.
        namespace: Ray's, in which our agents and reservations have their names: each installation on a cluster has its
            own, or they would replace each other's agents for ever.
    """

    def __init__(self, find_address: Callable[[], str], config: AgentConfig, namespace: str) -> None:
        self._find_address = find_address
        self._namespace = namespace
        self._config = config
        self._fingerprint = fingerprint(config)
        # Apart from each other: reading GPUs may take a minute, and agents that hang hold up their callers.
        self._looking = ThreadPoolExecutor(LOOKING, thread_name_prefix="ray-look")
        self._calling = ThreadPoolExecutor(CALLING, thread_name_prefix="ray-call")
        self._reserving = ThreadPoolExecutor(RESERVING, thread_name_prefix="ray-reserve")
        self._connecting: Future[None] | None = None
        self._guard = threading.Lock()
        self._calls = 0
        self._call_ended = threading.Condition(self._guard)
        self._leaving = ""
        self._closed = False
        self._address = ""
        self._agents: dict[str, Any] = {}
        self._alive: frozenset[str] = frozenset()
        self._seen_once = False
        self._swept_s = 0.0

    async def look(self, believed: Mapping[str, Mapping[str, str]]) -> tuple[NodeView, ...]:
        # Apart, so that a head that died is told of long before the patience with a new one is over.
        await self._in_thread(self._looking, CONNECT_LIMIT_S, self._join)
        return await self._in_thread(self._looking, CALL_LIMIT_S, self._look, believed)

    async def reserve(self, wanted: Reservation) -> tuple[int, ...]:
        return await self._in_thread(self._reserving, GPU_READ_LIMIT_S + CALL_LIMIT_S, self._reserve, wanted)

    async def release(self, attempt_id: str) -> None:
        await self._in_thread(self._calling, CALL_LIMIT_S, self._release, attempt_id)

    async def reserved(self) -> frozenset[str]:
        return await self._in_thread(self._calling, CALL_LIMIT_S, self._reserved)

    async def start(self, node_id: str, order: StartOrder) -> None:
        await self._in_thread(self._calling, CALL_LIMIT_S, self._call_agent, node_id, "start", order)

    async def stop(self, node_id: str, attempt_id: str, grace_s: float, reason: str) -> bool:
        call = functools.partial(self._call_agent, node_id, "stop", attempt_id, grace_s, reason)
        return bool(await self._in_thread(self._calling, CALL_LIMIT_S, call))

    async def drop(self, node_id: str, attempt_id: str) -> None:
        await self._in_thread(self._calling, CALL_LIMIT_S, self._call_agent, node_id, "drop", attempt_id)

    async def close(self) -> None:
        """Leaves the cluster as it is: agents, reservations and jobs live on. Nothing is called after it."""
        with contextlib.suppress(ClusterAway, asyncio.CancelledError):
            await self._in_thread(self._looking, CALL_LIMIT_S, self._leave)
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

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """A connection to the present head that stays until the block is left. Ray's own errors become ours."""
        with self._guard:
            self._connect()
            self._calls += 1
        try:
            with _told_as_away():
                yield
        finally:
            with self._guard:
                self._calls -= 1
                self._call_ended.notify_all()

    def _connect(self) -> None:
        """Makes sure there is a connection to the present head; under the guard. Raises ClusterAway."""
        import ray

        if self._closed or self._leaving:
            raise ClusterAway(self._leaving or STOPPING)
        address = self._find_address()
        if not address:
            raise ClusterAway(STARTING)
        if not _answers(address):
            yet = "" if self._seen_once else " yet"
            silent = f"the Ray head at {address} does not answer{yet}"
            self._disconnect(silent)
            raise ClusterAway(silent)
        if self._address == address and ray.is_initialized():
            return
        if self._connecting is None:
            self._disconnect(f"the Ray head at {address} is new")
            self._connecting = _in_own_thread(functools.partial(_init, address, self._namespace))
        try:
            self._connecting.result(CONNECT_LIMIT_S - 5)
        except TimeoutError:
            # The thread cannot be ended; it is waited for again instead of starting a second one beside it.
            raise ClusterAway(f"the Ray head at {address} accepts no driver yet") from None
        except Exception as error:
            self._connecting = None
            reason = short_reason(str(error), 200)
            raise ClusterAway(f"the Ray head at {address} refuses us (wrong token?): {reason}") from error
        self._connecting = None
        self._address, self._seen_once = address, True
        log.info("connected to Ray", extra={"address": address})

    def _join(self) -> None:
        with self._guard:
            self._connect()

    def _leave(self) -> None:
        self._closed = True
        with self._guard:
            self._disconnect(STOPPING)

    def _disconnect(self, why: str) -> None:
        """Shuts Ray down when the calls under way have ended; under the guard, and new ones are refused meanwhile."""
        import ray

        self._address, self._leaving = "", why
        try:
            if not self._call_ended.wait_for(lambda: self._calls == 0, CALLS_END_S):
                log.warning("leaving the Ray head while calls hang", extra={"calls": self._calls})
            self._agents.clear()
            self._alive = frozenset()
            if ray.is_initialized():
                log.warning("leaving the Ray head", extra={"reason": why})
                ray.shutdown()
        finally:
            self._leaving = ""

    def _look(self, believed: Mapping[str, Mapping[str, str]]) -> tuple[NodeView, ...]:
        with self._connected():
            nodes = _living_nodes()
            self._alive = frozenset(nodes)
            for node_id in set(self._agents) - set(nodes):
                self._agents.pop(node_id, None)
            views = self._ask_agents(nodes, believed)
            self._sweep_agents()
        return tuple(_node_view(node, views.get(node_id)) for node_id, node in sorted(nodes.items()))

    def _ask_agents(self, nodes: Mapping[str, Any], believed: Mapping[str, Mapping[str, str]]) -> dict[str, AgentView]:
        """All at once: one slow node does not make the others wait longer than the limit."""
        import ray

        asked = {self._agent(node_id).look.remote(dict(believed.get(node_id, {}))): node_id for node_id in nodes}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=AGENT_ANSWERS_S) if asked else ([], [])
        views: dict[str, AgentView] = {}
        for ref in ready:
            node_id = asked[ref]
            try:
                told, view = ray.get(ref)
            except ray.exceptions.RayError as error:
                log.warning("agent does not answer", extra={"node_id": node_id, "reason": short_reason(str(error))})
                self._forget_if_dead(node_id, error)
                continue
            if told == self._fingerprint:
                views[node_id] = view
            else:
                self._replace_agent(node_id)
        return views

    def _agent(self, node_id: str) -> Any:
        if node_id not in self._agents:
            self._agents[node_id] = self._make_agent(node_id)
        return self._agents[node_id]

    def _make_agent(self, node_id: str) -> Any:
        """The node's agent, made unless there is one."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {
            "name": AGENT_PREFIX + node_id,
            "namespace": self._namespace,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": 100,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
            "runtime_env": {"env_vars": {"PYTHONPATH": _ROOT}},
        }
        return ray.remote(RayNodeAgent).options(**options).remote(node_id, self._config)

    def _replace_agent(self, node_id: str) -> None:
        """Another version or configuration: its attempts live on, and the next agent finds them."""
        import ray

        log.info("agent is replaced", extra={"node_id": node_id})
        agent = self._agent(node_id)
        self._agents.pop(node_id, None)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(agent.leave.remote(), timeout=AGENT_ANSWERS_S)
        ray.kill(agent, no_restart=True)

    def _forget_if_dead(self, node_id: str, error: Exception) -> None:
        import ray

        if isinstance(error, ray.exceptions.ActorDiedError):
            self._agents.pop(node_id, None)

    def _sweep_agents(self) -> None:
        """Ends agents that Ray still wants to restart on nodes that are no more."""
        import ray

        if time.monotonic() - self._swept_s < SWEEP_S:
            return
        self._swept_s = time.monotonic()
        for name in ray.util.list_named_actors():
            if name.startswith(AGENT_PREFIX) and name.removeprefix(AGENT_PREFIX) not in self._alive:
                with contextlib.suppress(ValueError):
                    ray.kill(ray.get_actor(name), no_restart=True)

    def _reserve(self, wanted: Reservation) -> tuple[int, ...]:
        import ray
        from ray.util.placement_group import placement_group

        with self._connected():
            if not self._is_alive(wanted.node_id):
                raise NodeAway(f"the node {wanted.node_id[:12]} is not among the living ones")
            try:
                group = placement_group(
                    [dict(wanted.amounts)],
                    strategy="STRICT_PACK",
                    name=wanted.attempt_id,
                    lifetime="detached",
                    bundle_label_selector=[{_NODE_LABEL: wanted.node_id}],
                )
            except ray.exceptions.RaySystemError as error:
                if "already exists" not in str(error):
                    raise
                group = ray.util.get_placement_group(wanted.attempt_id)
            if not group.wait(ROOM_WAIT_S):
                raise NoRoom(f"Ray has not reserved {_told_amounts(wanted.amounts)} on the node")
            return _gpu_indices(group, wanted.gpu_count) if wanted.gpu_count else ()

    def _is_alive(self, node_id: str) -> bool:

        if node_id not in self._alive:
            self._alive = frozenset(_living_nodes())
        return node_id in self._alive

    def _release(self, attempt_id: str) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        with self._connected():
            try:
                group = ray.util.get_placement_group(attempt_id)
            except ValueError:
                return
            remove_placement_group(group)

    def _reserved(self) -> frozenset[str]:
        from ray.util.placement_group import placement_group_table

        with self._connected():
            groups = placement_group_table().values()
            return frozenset(group["name"] for group in groups if group["name"] and group["state"] != "REMOVED")

    def _call_agent(self, node_id: str, method: str, *args: Any) -> Any:
        import ray

        with self._connected():
            if not self._is_alive(node_id):
                raise ClusterAway(f"the node {node_id[:12]} is not among the living ones")
            try:
                return ray.get(getattr(self._agent(node_id), method).remote(*args), timeout=CALL_LIMIT_S - 2)
            except ray.exceptions.RayError as error:
                self._forget_if_dead(node_id, error)
                raise


def _living_nodes() -> dict[str, Any]:
    import ray

    untyped: Any = ray
    return {node["NodeID"]: node for node in untyped.nodes() if node["Alive"]}


def _init(address: str, namespace: str) -> None:
    import ray

    keep_loopback()
    ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PORT_ANSWERS_S).close()
    except (OSError, ValueError):
        return False
    return True


def _in_own_thread(work: Callable[[], None]) -> Future[None]:
    """Not in the pool: it may hang for minutes, and must not take a place there."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="ray-connect", daemon=True).start()
    return future


def _gpu_indices(group: Any, count: float) -> tuple[int, ...]:
    """The GPUs that Ray gave the bundle, read once inside of it."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(group, 0)
    # max_calls: by default a GPU task ends its worker, which costs a second (measured).
    task = ray.remote(num_cpus=0, num_gpus=count, max_calls=0, scheduling_strategy=strategy)(_gpu_reader())
    found = ray.get(task.remote(), timeout=GPU_READ_LIMIT_S)
    return tuple(sorted(int(index) for index in found))


def _gpu_reader() -> Callable[[], list[str]]:
    """A function that Ray pickles by value, as workers of the cluster do not have our code on their path."""

    def read() -> list[str]:
        import ray

        return [str(index) for index in ray.get_runtime_context().get_accelerator_ids()["GPU"]]

    return read


def _node_view(node: Mapping[str, Any], agent: AgentView | None) -> NodeView:
    amounts = node["Resources"]
    models = [name.removeprefix("accelerator_type:") for name in amounts if name.startswith("accelerator_type:")]
    return NodeView(
        id=node["NodeID"],
        hostname=node["NodeManagerHostname"],
        cpu_count=amounts.get("CPU", 0.0),
        memory_bytes=int(amounts.get("memory", 0)),
        gpu_count=amounts.get("GPU", 0.0),
        gpu_model=", ".join(sorted(models)),
        agent=agent,
    )


def _told_amounts(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())


@contextlib.contextmanager
def _told_as_away() -> Iterator[None]:
    """Ray's own errors become ours; whether a call took effect is not known then.

    ValueError is how Ray says that a name is not there: somebody removed it a moment ago.
    """
    import ray

    try:
        yield
    except (ray.exceptions.RayError, ConnectionError, TimeoutError, ValueError) as error:
        raise ClusterAway(f"Ray: {short_reason(str(error), 300) or type(error).__name__}") from error
