"""What the executor needs from the cluster beneath it, and the plain values that cross that border."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from libs.common.contracts.messages import Execution, JobTemplate
from libs.common.errors import NablaError
from services.executor.domain.doors import DoorTicket
from services.executor.domain.execution import execution_id


class ClusterAway(NablaError):
    """The cluster or the node's agent does not answer now; whether the call took effect is not known."""


class NodeAway(NablaError):
    """The cluster answers and says that this node is not among its living ones."""


class NoRoom(NablaError):
    """The cluster has not reserved the resources yet; asking again goes on waiting for the same reservation."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds on its node. Amounts as Ray names them."""

    node_id: str
    amounts: Mapping[str, float]

    @property
    def gpu_count(self) -> float:
        return self.amounts.get("GPU", 0.0)


@dataclass(frozen=True, slots=True)
class Reservation:
    """What an attempt holds, by rank; its name in the cluster is the attempt id."""

    attempt_id: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Peer:
    """One rank of a gang as the others see it.

    Args:
        index: which of its role it is, from 0.
        node_rank: which of the gang's nodes it is on, from 0, in the order of the ranks.
        local_rank: which of the gang's ranks on that node it is, from 0.
        address: of its node, or loopback when the whole gang is on one.
    """

    rank: int
    role: str
    index: int
    node_rank: int
    local_rank: int
    address: str
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class GangOrder:
    """What a rank must know of its gang.

    Args:
        first_port, last_port: on every node of the gang these ports are the gang's alone, and lead to its peers.
        key: a secret that the ranks of this attempt share, and nobody else knows.
    """

    type: str
    rank: int
    peers: tuple[Peer, ...]
    first_port: int
    last_port: int
    key: str = field(repr=False)

    @property
    def me(self) -> Peer:
        return self.peers[self.rank]


@dataclass(frozen=True, slots=True)
class StartOrder:
    """Everything a node agent must know to run one process of an attempt.

    Args:
        template: what this process is to run.
        token: the attempt's own: the agent alone has it.
        gang: None for a job of one process.
    """

    attempt_id: str
    job_id: str
    number: int
    team_id: str
    project_id: str
    experiment_id: str
    template: JobTemplate
    token: str
    team_uid: int
    gpu_indices: tuple[int, ...] = ()
    traceparent: str = ""
    gang: GangOrder | None = None

    @property
    def rank(self) -> int:
        return self.gang.rank if self.gang else 0

    @property
    def execution_id(self) -> str:
        """Names this process among all, on its node as in the executor."""
        return execution_id(self.attempt_id, self.gang.rank if self.gang else None)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """What an agent knows of the installation; paths are those of its node, unless that has its own (`node_own`).

    Args:
        outer_front_door: as other machines than the executor's reach the front door; empty: as this one does.
        outer_nats_url: the same for NATS.
        door_key: in hex, under which tickets into running jobs are issued; without one the node has no door.
    """

    node_dir: str
    default_environment: str
    client_folder: str
    storage_root: str
    front_door: str
    nats_url: str
    nats_seed: str = field(repr=False)
    node_fence_s: float = 120.0
    isolation: str = "auto"
    job_network: str = "internet"
    job_network_allowed: tuple[str, ...] = ()
    sandbox_subnet: str = "100.96.0.0/16"
    container_runtime: str = "auto"
    environments_bytes: int = 20_000_000_000
    images_bytes: int = 50_000_000_000
    workspace_bytes: int = 20_000_000_000
    package_hosts: tuple[str, ...] = ()
    source_hosts: tuple[str, ...] = ()
    installer: str = "auto"
    log_limit_bytes: int = 10_000_000_000
    disk_reserve_bytes: int = 1_000_000_000
    unkept_bytes: int = 10_000_000_000
    unkept_s: float = 30 * 86_400.0
    traces: bool = False
    version: str = ""
    outer_front_door: str = ""
    outer_nats_url: str = ""
    door_key: str = field(default="", repr=False)

    def seen_from(self, *, elsewhere: bool) -> AgentConfig:
        """The configuration of an agent on the executor's machine, or elsewhere."""
        door, bus = self.outer_front_door or self.front_door, self.outer_nats_url or self.nats_url
        inner = replace(self, outer_front_door="", outer_nats_url="")
        return replace(inner, front_door=door, nats_url=bus) if elsewhere else inner


@dataclass(frozen=True, slots=True)
class Ticket:
    """How a new machine gets into the cluster: `address` is `host:port` of its head, or empty while there is none."""

    address: str
    token: str = field(repr=False)
    python_version: str
    ray_version: str


@dataclass(frozen=True, slots=True)
class AgentView:
    """An agent's answer.

    Args:
        held: executions with a folder on this node.
        news: executions whose state differs from the one that the executor believes in.
        runtimes: what it can run images with.
        network: how far its sandboxes' networks go.
        door: "host:port" at which its running jobs are entered.
    """

    isolation: str
    isolation_detail: str
    held: frozenset[str] = frozenset()
    news: tuple[Execution, ...] = ()
    runtimes: tuple[str, ...] = ()
    network: str = ""
    gpu_model: str = ""
    gpu_memory_bytes: int = 0
    door: str = ""


class DoorTickets(Protocol):
    """Makes tickets that the door of a node believes."""

    hold_s: int

    def issue(self, ticket: DoorTicket) -> str: ...

    def host_key_line(self, attempt_id: str) -> str:
        """The key of the attempt's SSH server, as known_hosts has it."""


class Authority(Protocol):
    """Makes certificates that nodes believe."""

    @property
    def certificate(self) -> str:
        """Its own, in PEM."""

    def of_front_door(self, public_key: str) -> str:
        """Of an Ed25519 public key in PEM. Raises ValueError when it is none."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node as the cluster sees it; `agent` is None when its agent does not answer, or none is wanted there."""

    id: str
    hostname: str
    cpu_count: float
    memory_bytes: int
    gpu_count: float
    gpu_model: str = ""
    gpu_memory_bytes: int = 0
    address: str = ""
    is_head: bool = False
    agent: AgentView | None = None


class Nodes(Protocol):
    async def look(
        self, believed: Mapping[str, Mapping[str, str]], resting: Collection[str] = ()
    ) -> tuple[NodeView, ...]:
        """The living nodes, each with an agent that is started where there was none.

        Args:
            believed: node id -> execution id -> the state that the executor has for it.
            resting: nodes that shall have no agent: one that is there leaves.

        Raises:
            ClusterAway: there is no cluster; the text says why, for people.
        """


class Reservations(Protocol):
    async def reserve(self, wanted: Reservation) -> tuple[tuple[int, ...], ...]:
        """Holds the resources of all ranks until released, or of none, and answers the indices of each one's GPUs.

        Repeating it is harmless. Raises ClusterAway, NodeAway or NoRoom.
        """

    async def release(self, attempt_id: str) -> None:
        """Gives the resources back, also those still waited for; nothing happens when there are none."""

    async def reserved(self) -> frozenset[str]:
        """Attempts for which something is held or waited for."""


class Agents(Protocol):
    """Orders to node agents. Each can be repeated; each raises ClusterAway when the agent does not answer."""

    async def start(self, node_id: str, order: StartOrder) -> None: ...

    async def stop(self, node_id: str, execution_id: str, grace_s: float, reason: str) -> bool:
        """Asks for the end; False when the node has never heard of the execution, which then never starts there."""

    async def drop(self, node_id: str, execution_id: str) -> None:
        """Deletes what is left of an execution that has ended."""

    async def held_order(self, node_id: str, execution_id: str) -> StartOrder | None:
        """The order that an execution on the node was started with; None when it is not there."""


class Logs(Protocol):
    """Questions to storage, for when its events do not come."""

    async def is_sealed(self, team_id: str, job_id: str) -> bool:
        """Whether the object store has the job's whole log; False for a job that storage does not know.

        Raises:
            Refusal: it does not answer, or not to us.
        """


class Autoscaler(Protocol):
    async def ask_for(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Asks for room for all of these at once, in place of what was asked before; the autoscaler may have none.

        Raises ClusterAway.
        """


class Cluster(Nodes, Reservations, Agents, Autoscaler, Protocol):
    """One Ray cluster."""

    async def close(self) -> None: ...
