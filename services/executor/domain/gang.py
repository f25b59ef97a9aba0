"""How a gang's ranks lie on nodes, and which ports they have.

The first of a gang's ports is where its ranks meet, then each rank has one; the rest is for what they open themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from libs.common.contracts.gangs import Rank
from services.executor.domain.execution import execution_id
from services.executor.ports import GangOrder, Peer

# Beneath where systems give out ports by themselves, and above where Ray has its workers.
FIRST_PORT = 20_480
PORT_COUNT = 512
BLOCKS = 24
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class GangFacts:
    """What is decided of a gang when its attempt is accepted."""

    node_ids: tuple[str, ...]
    first_port: int
    key: str

    @property
    def last_port(self) -> int:
        return self.first_port + PORT_COUNT - 1


def free_block(taken: Collection[int]) -> int:
    """The first port of a block that no other gang on the same nodes has; 0 when there is none."""
    blocks = (FIRST_PORT + number * PORT_COUNT for number in range(BLOCKS))
    return next((first for first in blocks if first not in taken), 0)


def meeting_port(order: GangOrder) -> int:
    """Where the ranks find rank 0: torch's MASTER_PORT, the head of a private Ray cluster."""
    return order.first_port


def port_of(order: GangOrder, rank: int) -> int:
    """The port that is this rank's own on its node, as its peers know it."""
    return order.first_port + 1 + rank


def first_free_port(order: GangOrder) -> int:
    """From here on the ports are for what the ranks open without a wish of their own."""
    return port_of(order, len(order.peers))


def gang_order(
    kind: str, facts: GangFacts, ranks: Sequence[Rank], rank: int, addresses: Mapping[str, str]
) -> GangOrder:
    """What the agent of one rank is told.

    Args:
        addresses: of the nodes, as others reach them.
    """
    nodes = list(dict.fromkeys(facts.node_ids))
    seen: Counter[str] = Counter()
    peers = []
    for member, node_id in zip(ranks, facts.node_ids, strict=True):
        address = LOOPBACK if len(nodes) == 1 else addresses[node_id]
        where = nodes.index(node_id), seen[node_id], address, node_id
        peers.append(Peer(member.number, member.role, member.index, *where))
        seen[node_id] += 1
    return GangOrder(kind, rank, tuple(peers), facts.first_port, facts.last_port, facts.key)


def missing_addresses(facts: GangFacts, addresses: Mapping[str, str]) -> list[str]:
    """The nodes of the gang of which nobody knows how others reach them; none when it is all on one."""
    nodes = set(facts.node_ids)
    return sorted(node for node in nodes if len(nodes) > 1 and not addresses.get(node))


def execution_ids(attempt_id: str, rank_count: int, *, is_gang: bool) -> tuple[str, ...]:
    """Of all processes of an attempt, by rank."""
    return tuple(execution_id(attempt_id, rank if is_gang else None) for rank in range(rank_count))
