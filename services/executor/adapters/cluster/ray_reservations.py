"""Reservations on a Ray cluster: one detached placement group for each attempt, named by the attempt, with one bundle
for each rank, all of which Ray reserves or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.executor.adapters.cluster.ray_connection import RayConnection
from services.executor.ports import NodeAway, NoRoom, Part, Reservation

ROOM_WAIT_S = 1.0
GPU_READ_LIMIT_S = 60.0
_NODE_LABEL = "ray.io/node-id"


class RayReservations:
    """Each call blocks.

    Args:
        is_alive: whether a node is among the living ones.
    """

    def __init__(self, connection: RayConnection, is_alive: Callable[[str], bool]) -> None:
        self._connection = connection
        self._is_alive = is_alive

    def reserve(self, wanted: Reservation) -> tuple[tuple[int, ...], ...]:
        import ray
        from ray.util.placement_group import placement_group

        with self._connection.in_use():
            for node_id in {part.node_id for part in wanted.parts}:
                if not self._is_alive(node_id):
                    raise NodeAway(f"the node {node_id[:12]} is not among the living ones")
            try:
                group = placement_group(
                    [dict(part.amounts) for part in wanted.parts],
                    strategy="PACK",
                    name=wanted.attempt_id,
                    lifetime="detached",
                    bundle_label_selector=[{_NODE_LABEL: part.node_id} for part in wanted.parts],
                )
            except ray.exceptions.RaySystemError as error:
                if "already exists" not in str(error):
                    raise
                group = ray.util.get_placement_group(wanted.attempt_id)
            if not group.wait(ROOM_WAIT_S):
                raise NoRoom(f"Ray has not reserved {_told_parts(wanted.parts)}")
            return _gpu_indices(group, wanted.parts)

    def release(self, attempt_id: str) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        with self._connection.in_use():
            try:
                group = ray.util.get_placement_group(attempt_id)
            except ValueError:
                return
            remove_placement_group(group)

    def reserved(self) -> frozenset[str]:
        from ray.util.placement_group import placement_group_table

        with self._connection.in_use():
            groups = placement_group_table().values()
            return frozenset(group["name"] for group in groups if group["name"] and group["state"] != "REMOVED")

    def ask_for(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Ray keeps it until it is asked for something else; its autoscaler counts bundles that fit already."""
        from ray.autoscaler.sdk import request_resources

        with self._connection.in_use():
            request_resources(bundles=[dict(bundle) for bundle in bundles])


def _gpu_indices(group: Any, parts: Sequence[Part]) -> tuple[tuple[int, ...], ...]:
    """The GPUs that Ray gave each bundle, read once inside of it; of all at the same time."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    asked = {}
    for index, part in enumerate(parts):
        if part.gpu_count:
            strategy = PlacementGroupSchedulingStrategy(group, index)
            # max_calls: by default a GPU task ends its worker, which costs a second (measured).
            count = part.gpu_count
            task = ray.remote(num_cpus=0, num_gpus=count, max_calls=0, scheduling_strategy=strategy)(_gpu_reader())
            asked[index] = task.remote()
    found = dict(zip(asked, ray.get(list(asked.values()), timeout=GPU_READ_LIMIT_S), strict=True))
    return tuple(numbers_of(found.get(index, ())) for index in range(len(parts)))


def numbers_of(names: Sequence[str]) -> tuple[int, ...]:
    """Ray's names of GPUs, which it takes from its node's CUDA_VISIBLE_DEVICES where that is set.

    Raises:
        NoRoom: they are UUIDs, as parts of a divided GPU (MIG) have: no device node can be told from those.
    """
    if unknown := [name for name in names if not name.isdecimal()]:
        raise NoRoom(
            f"Ray calls a GPU of the node {unknown[0]}, not by its number: start Ray there without "
            "CUDA_VISIBLE_DEVICES or with numbers in it; parts of a divided GPU (MIG) cannot be given to jobs"
        )
    return tuple(sorted(map(int, names)))


def _gpu_reader() -> Callable[[], list[str]]:
    """A function that Ray pickles by value, as workers of the cluster do not have our code on their path."""

    def read() -> list[str]:
        import ray

        return [str(index) for index in ray.get_runtime_context().get_accelerator_ids()["GPU"]]

    return read


def _told_parts(parts: Sequence[Part]) -> str:
    told = [f"{_told_amounts(part.amounts)} on the node" for part in parts]
    return told[0] if len(told) == 1 else f"{len(told)} parts at once, such as {told[0]}"


def _told_amounts(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())
