"""What to ask of the cluster's autoscaler for queued work that no present node can take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from libs.common.contracts.messages import Demand
from services.executor.domain.execution import amounts_for
from services.executor.domain.inventory import KnownNode

# What is not repeated for so long is withdrawn: the scheduler repeats it every few seconds while it holds.
HOLDS_S = 60.0
# GPU models, as Ray names them among a node's resources.
MODEL_PREFIX = "accelerator_type:"
MODEL_SHARE = 0.001

Bundle = dict[str, float]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the autoscaler is asked for.

    Args:
        left_out: how many jobs wait beyond what may be asked for.
    """

    bundles: tuple[Bundle, ...]
    left_out: int


def bundles_for(demands: Iterable[Demand], present: Sequence[Bundle], limit: int) -> Asked:
    """One bundle for each waiting job, the larger shapes first, `limit` at most, beside what is there already.

    Each shape gets its turn, so that a thousand small jobs do not hide a large one: the cluster grows by some of each.

    Args:
        present: each node as a bundle. Ray packs what it is asked for into whole nodes, whatever runs on them: asked
            for the waiting jobs alone, it would find them room on the nodes that are full.
    """
    waiting = [(_bundle(demand), demand.count) for demand in demands if demand.count > 0]
    waiting.sort(key=lambda each: (-each[0].get("GPU", 0), -each[0]["CPU"], sorted(each[0].items())))
    total = sum(count for _, count in waiting)
    bundles: list[Bundle] = []
    turn = 0
    while len(bundles) < min(limit, total):
        bundles += [bundle for bundle, count in waiting if turn < count]
        turn += 1
    return Asked((*present, *bundles[:limit]) if bundles else (), max(0, total - limit))


def held_by(node: KnownNode) -> Bundle:
    """A bundle that only this node, or one like it, can hold."""
    amounts = {"CPU": node.cpu_count, "GPU": node.gpu_count, "memory": float(node.memory_bytes)}
    return {name: amount for name, amount in amounts.items() if amount}


def _bundle(demand: Demand) -> Bundle:
    bundle = amounts_for(demand.resources)
    if demand.resources.gpu_model:
        bundle[MODEL_PREFIX + demand.resources.gpu_model] = MODEL_SHARE
    return bundle
