"""The nodes of a Ray cluster, and our agent on each: a named detached actor with hard affinity to its node."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from services.executor.adapters.cluster.ray_agent import RayNodeAgent, fingerprint
from services.executor.adapters.cluster.ray_connection import RayConnection
from services.executor.domain.execution import short_reason
from services.executor.ports import AgentConfig, AgentView, ClusterAway, NodeView

AGENT_PREFIX = "nabla-agent-"
# Labels of nodes: it brings the agent's code in its own PYTHONPATH; what its GPUs are, where nobody can be asked.
CODE_LABEL = "nabla-code"
GPU_MODEL_LABEL = "nabla-gpu-model"
GPU_MEMORY_LABEL = "nabla-gpu-memory-bytes"
AGENT_ANSWERS_S = 4.0
ORDER_LIMIT_S = 8.0
SWEEP_S = 30.0
_ROOT = str(Path(__file__).resolve().parents[4])

log = logging.getLogger(__name__)


class RayNodes:
    """Looks at the nodes and passes orders to their agents; each call blocks.

    Args:
        config: what each node's agent is told; agents that were told something else are replaced.
        namespace: each installation on a cluster has its own, or they would replace each other's agents for ever.
    """

    def __init__(self, connection: RayConnection, config: AgentConfig, namespace: str) -> None:
        self._connection = connection
        # By whether the node is another machine than this one.
        self._configs = {elsewhere: config.seen_from(elsewhere=elsewhere) for elsewhere in (False, True)}
        self._fingerprints = {elsewhere: fingerprint(seen) for elsewhere, seen in self._configs.items()}
        self._namespace = namespace
        self._agents: dict[str, Any] = {}
        self._alive: Mapping[str, Any] = {}
        self._swept_s = 0.0
        connection.on_leave(self._forget)

    def _forget(self) -> None:
        """Another head has other actors."""
        self._agents.clear()
        self._alive = {}

    def is_alive(self, node_id: str) -> bool:
        """Whether the node is a living one; call it within a connection in use."""
        return self._living(node_id) is not None

    def _living(self, node_id: str) -> Mapping[str, Any] | None:
        if node_id not in self._alive:
            self._alive = _living_nodes()
        return self._alive.get(node_id)

    def look(self, believed: Mapping[str, Mapping[str, str]], resting: Collection[str]) -> tuple[NodeView, ...]:
        """The living nodes; the agents of those that shall rest leave, and all others have one."""
        with self._connection.in_use():
            nodes = _living_nodes()
            self._alive = nodes
            for node_id in set(self._agents) - set(nodes):
                self._agents.pop(node_id, None)
            views = self._ask_agents({id_: node for id_, node in nodes.items() if id_ not in resting}, believed)
            for node_id in nodes.keys() & set(resting):
                self._end_agent(node_id)
            self._sweep_agents()
        return tuple(_node_view(node, views.get(node_id)) for node_id, node in sorted(nodes.items()))

    def call(self, node_id: str, method: str, *args: Any) -> Any:
        import ray

        with self._connection.in_use():
            node = self._living(node_id)
            if node is None:
                raise ClusterAway(f"the node {node_id[:12]} is not among the living ones")
            try:
                return ray.get(getattr(self._agent(node_id, node), method).remote(*args), timeout=ORDER_LIMIT_S)
            except ray.exceptions.RayError as error:
                self._forget_if_dead(node_id, error)
                raise

    def _ask_agents(self, nodes: Mapping[str, Any], believed: Mapping[str, Mapping[str, str]]) -> dict[str, AgentView]:
        """All at once: one slow node does not make the others wait longer than the limit."""
        import ray

        asked = {
            self._agent(node_id, node).look.remote(dict(believed.get(node_id, {}))): node_id
            for node_id, node in nodes.items()
        }
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
            if told == self._fingerprints[_is_elsewhere(nodes[node_id])]:
                views[node_id] = view
            else:
                log.info("agent is replaced", extra={"node_id": node_id})
                self._end_agent(node_id)
        return views

    def _agent(self, node_id: str, node: Mapping[str, Any]) -> Any:
        if node_id not in self._agents:
            self._agents[node_id] = self._make_agent(node_id, node)
        return self._agents[node_id]

    def _make_agent(self, node_id: str, node: Mapping[str, Any]) -> Any:
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
        }
        if CODE_LABEL not in node["Labels"]:
            options["runtime_env"] = {"env_vars": {"PYTHONPATH": _ROOT}}
        config = self._configs[_is_elsewhere(node)]
        return ray.remote(RayNodeAgent).options(**options).remote(node_id, config)

    def _end_agent(self, node_id: str) -> None:
        """Its attempts live on, and the next agent finds them. Nothing happens where there is none."""
        import ray

        agent = self._agents.pop(node_id, None)
        if agent is None:
            try:
                agent = ray.get_actor(AGENT_PREFIX + node_id)
            except ValueError:
                return
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


def _is_elsewhere(node: Mapping[str, Any]) -> bool:
    """Whether it is another machine than this one: no address of ours is its own."""
    address = str(node["NodeManagerAddress"])
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return True
    return False


def _node_view(node: Mapping[str, Any], agent: AgentView | None) -> NodeView:
    amounts = node["Resources"]
    models = [name.removeprefix("accelerator_type:") for name in amounts if name.startswith("accelerator_type:")]
    labels = node["Labels"]
    return NodeView(
        id=node["NodeID"],
        hostname=node["NodeManagerHostname"],
        cpu_count=amounts.get("CPU", 0.0),
        memory_bytes=int(amounts.get("memory", 0)),
        gpu_count=amounts.get("GPU", 0.0),
        gpu_model=labels.get(GPU_MODEL_LABEL) or ", ".join(sorted(models)),
        gpu_memory_bytes=int(labels.get(GPU_MEMORY_LABEL, 0)),
        address=node["NodeManagerAddress"],
        is_head="node:__internal_head__" in amounts,
        agent=agent,
    )
