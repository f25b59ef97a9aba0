"""Which nodes there are, which can be counted on, and when a silent one may be given up.

A node is in contact while the cluster's head or the executor hears its agent. Out of contact for `fence_s` its
shims end their sandboxes by themselves; only LOST_MARGIN_S later may its runs be called lost. While the head does
not answer us, a node that it heard when it last did may still be in contact with it, and its jobs run on: so its
silence counts from the head's next answer. Durations only, on one clock that goes on while the machine sleeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

READY, SILENT, GONE = "ready", "silent", "gone"
LOST_MARGIN_S = 30.0


@dataclass(frozen=True, slots=True)
class KnownNode:
    """A node as the executor knows it. `heard_s` is when it was last in contact, on the executor's own clock."""

    id: str
    hostname: str
    state: str
    cpu_count: float
    memory_bytes: int
    gpu_count: float
    gpu_model: str = ""
    isolation: str = ""
    isolation_detail: str = ""
    heard_s: float = 0.0


def next_inventory(
    known: Iterable[KnownNode], seen: Mapping[str, KnownNode], now_s: float, fence_s: float
) -> tuple[KnownNode, ...]:
    """The inventory after one look.

    Args:
        known: what was believed before.
        seen: the living nodes of this look.
    """
    unseen = (_without_contact(node, now_s, fence_s) for node in known if node.id not in seen)
    return tuple(sorted([*seen.values(), *unseen], key=lambda node: node.id))


def inventory_unasked(
    known: Iterable[KnownNode], looked_s: float, now_s: float, fence_s: float
) -> tuple[KnownNode, ...]:
    """The inventory after a look that the cluster's head did not answer.

    Args:
        known: what was believed before.
        looked_s: when the look before this one was: nodes heard since then are given the benefit of the doubt.
    """
    doubted = (replace(node, heard_s=now_s) if node.heard_s >= looked_s else node for node in known)
    return next_inventory(doubted, {}, now_s, fence_s)


def _without_contact(node: KnownNode, now_s: float, fence_s: float) -> KnownNode:
    gone = node.state == GONE or now_s - node.heard_s >= fence_s + LOST_MARGIN_S
    return replace(node, state=GONE if gone else SILENT)


def changed(before: Iterable[KnownNode], after: Iterable[KnownNode]) -> bool:
    """Whether anything differs that others want to know: the moment of the last contact does not count."""
    return {replace(node, heard_s=0.0) for node in before} != {replace(node, heard_s=0.0) for node in after}
