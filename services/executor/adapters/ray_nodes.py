"""The nodes of a Ray cluster, and our agent on each: a named detached actor with hard affinity to its node."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.executor.adapters.ray_agent import RayNodeAgent, fingerprint
from services.executor.adapters.ray_connection import RayConnection
from services.executor.domain.execution import short_reason
from services.executor.ports import AgentConfig, AgentView, ClusterAway, NodeView

AGENT_PREFIX = "nabla-agent-"
AGENT_ANSWERS_S = 4.0
ORDER_LIMIT_S = 8.0
SWEEP_S = 30.0
_ROOT = str(Path(__file__).resolve().parents[3])

log = logging.getLogger(__name__)


class RayNodes:
    """Looks at the nodes and passes orders to their agents; each call blocks.

    Args:
        config: what each node's agent is told; agents that were told something else are replaced.
        namespace: each installation on a cluster has its own, or they would replace each other's agents for ever.
    """

    def __init__(self, connection: RayConnection, config: AgentConfig, namespace: str) -> None:
        self._connection = connection
        self._config = config
        self._fingerprint = fingerprint(config)
        self._namespace = namespace
        self._agents: dict[str, Any] = {}
        self._alive: frozenset[str] = frozenset()
        self._swept_s = 0.0
        connection.on_leave(self._forget)

    def _forget(self) -> None:
        """Another head has other actors."""
        self._agents.clear()
        self._alive = frozenset()

    def is_alive(self, node_id: str) -> bool:
        """Whether the node is a living one; call it within a connection in use."""
        if node_id not in self._alive:
            self._alive = frozenset(_living_nodes())
        return node_id in self._alive

    def look(self, believed: Mapping[str, Mapping[str, str]]) -> tuple[NodeView, ...]:
        with self._connection.in_use():
            nodes = _living_nodes()
            self._alive = frozenset(nodes)
            for node_id in set(self._agents) - set(nodes):
                self._agents.pop(node_id, None)
            views = self._ask_agents(nodes, believed)
            self._sweep_agents()
        return tuple(_node_view(node, views.get(node_id)) for node_id, node in sorted(nodes.items()))

    def call(self, node_id: str, method: str, *args: Any) -> Any:
        import ray

        with self._connection.in_use():
            if not self.is_alive(node_id):
                raise ClusterAway(f"the node {node_id[:12]} is not among the living ones")
            try:
                return ray.get(getattr(self._agent(node_id), method).remote(*args), timeout=ORDER_LIMIT_S)
            except ray.exceptions.RayError as error:
                self._forget_if_dead(node_id, error)
                raise

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


def _living_nodes() -> dict[str, Any]:
    import ray

    untyped: Any = ray
    return {node["NodeID"]: node for node in untyped.nodes() if node["Alive"]}


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
