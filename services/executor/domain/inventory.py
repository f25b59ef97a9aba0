"""Which nodes there are, which can be counted on, and when a silent one may be given up.

A node is in contact while the cluster's head or the executor hears its agent. Out of contact for `fence_s` its
shims end their sandboxes by themselves; only LOST_MARGIN_S later may its runs be called lost. While the head does
not answer us, a node that it heard when it last did may still be in contact with it, and its jobs run on: so its
silence counts from the head's next answer. Durations only, on one clock that goes on while the machine sleeps.

A node with nothing to do may rest: it loses its agent, so that an autoscaler or a person may take it away. Nothing is
placed on a resting node; it is woken when there is something to do, and gone as soon as the head no longer lists it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

READY, RESTING, SILENT, GONE = "ready", "resting", "silent", "gone"
LOST_MARGIN_S = 30.0


@dataclass(frozen=True, slots=True)
class KnownNode:
    """A node as the executor knows it.

    Args:
        heard_s: when it was last in contact, on the executor's own clock.
        busy_s: when it last had anything to do, or an attempt's folder, on the same clock.
        is_head: the cluster's head runs on it.
    """

    id: str
    hostname: str
    state: str
    cpu_count: float
    memory_bytes: int
    gpu_count: float
    gpu_model: str = ""
    isolation: str = ""
    isolation_detail: str = ""
    gpu_memory_bytes: int = 0
    address: str = ""
    runtimes: tuple[str, ...] = ()
    network: str = ""
    draining: bool = False
    is_head: bool = False
    heard_s: float = 0.0
    busy_s: float = 0.0


def next_inventory(
    known: Iterable[KnownNode], seen: Mapping[str, KnownNode], now_s: float, fence_s: float
) -> tuple[KnownNode, ...]:
    """The inventory after one look.

    Args:
        known: what was believed before.
        seen: the living nodes of this look.
    """
    unseen = (_without_contact(node, now_s, fence_s) for node in known if node.id not in seen)
    # Nothing runs on a resting node, so nothing has to be waited for.
    left = (replace(node, state=GONE) if node.state == RESTING else node for node in unseen)
    return tuple(sorted([*seen.values(), *left], key=lambda node: node.id))


def inventory_unasked(
    known: Iterable[KnownNode], looked_s: float, now_s: float, fence_s: float
) -> tuple[KnownNode, ...]:
    """The inventory after a look that the cluster's head did not answer.

    Args:
        known: what was believed before.
        looked_s: when the look before this one was: nodes heard since then are given the benefit of the doubt.
    """
    doubted = (replace(node, heard_s=now_s) if node.heard_s >= looked_s else node for node in known)
    return tuple(_without_contact(node, now_s, fence_s) for node in doubted)


def _without_contact(node: KnownNode, now_s: float, fence_s: float) -> KnownNode:
    if node.state == GONE or now_s - node.heard_s >= fence_s + LOST_MARGIN_S:
        return replace(node, state=GONE)
    return node if node.state == RESTING else replace(node, state=SILENT)


def changed(before: Iterable[KnownNode], after: Iterable[KnownNode]) -> bool:
    """Whether anything differs that others want to know: the moments of contact and work do not count."""
    return _timeless(before) != _timeless(after)


def _timeless(nodes: Iterable[KnownNode]) -> set[KnownNode]:
    return {replace(node, heard_s=0.0, busy_s=0.0) for node in nodes}


def may_rest(node: KnownNode, *, is_busy: bool, now_s: float, idle_s: float | None) -> bool:
    """Whether the node needs no agent now.

    Args:
        is_busy: something is there to do on it, or waits for a node to do it.
        idle_s: after so long without anything to do a node rests by itself; None: only one that drains does.
    """
    if is_busy:
        return False
    return node.draining or (idle_s is not None and not node.is_head and now_s - node.busy_s >= idle_s)
