"""Which GPUs of its node an execution gets: those that Ray gave it, unless somebody is on them.

A cluster's head that was lost comes back without its reservations. What runs is reserved again, but Ray cannot be told
on which GPUs, and counts others than are used; the next job would be put beside one that has the GPU for itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WHOLE = 1000


class Use(NamedTuple):
    """What one execution has of its node's GPUs: this share of each, in thousandths."""

    node_id: str
    indices: Sequence[int]
    milli: int


def share_of(gpu_count: float) -> int:
    """Of each single GPU."""
    return min(WHOLE, round(gpu_count * WHOLE))


def free_gpus(wanted: Sequence[Use], used: Iterable[Use], counts: dict[str, int]) -> list[list[int]] | None:
    """For each of `wanted`, whose indices are Ray's word, GPUs with room for it; None where there are not enough.

    Args:
        counts: how many GPUs each node has.
    """
    taken: defaultdict[tuple[str, int], int] = defaultdict(int)
    for use in used:
        _take(taken, use)
    found = []
    for want in wanted:
        indices = _fitting(want, taken, counts.get(want.node_id, 0))
        if indices is None:
            return None
        _take(taken, want._replace(indices=indices))
        found.append(indices)
    return found


def _take(taken: defaultdict[tuple[str, int], int], use: Use) -> None:
    for index in use.indices:
        taken[use.node_id, index] += use.milli


def _fitting(want: Use, taken: defaultdict[tuple[str, int], int], count: int) -> list[int] | None:
    """Others than Ray's: whole ones the first, a share on the fullest that has room, as Ray does it."""

    def has_room(index: int) -> bool:
        return taken[want.node_id, index] + want.milli <= WHOLE

    if all(map(has_room, want.indices)):
        return list(want.indices)
    if max(want.indices) >= count:  # the node counts its GPUs from another number than 0
        return None
    fitting = sorted(filter(has_room, range(count)), key=lambda index: (-taken[want.node_id, index], index))
    return sorted(fitting[: len(want.indices)]) if len(fitting) >= len(want.indices) else None
