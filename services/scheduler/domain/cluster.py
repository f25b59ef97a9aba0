"""What the machines have, who holds which part of it, and where something more would fit.

A share of a GPU fits only on one GPU that has so much left, so GPUs are counted one by one. Which GPU a process got
is known once its executor has said so; until then it is taken to be the fullest one that has room, as Ray does it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.scheduler.domain.shapes import (
    NOTHING,
    WHOLE_GPU,
    Parts,
    Shape,
    can_run,
    cpus_text,
    gpus_text,
    memory_text,
    offers,
)


@dataclass(frozen=True, slots=True)
class Machine:
    """A node that somebody knows of.

    Args:
        closed: why it takes no new work, for people; empty for one that does.
        is_island: its sandboxes reach no other node, so that a gang is on it as a whole or not at all.
    """

    total: Shape
    closed: str = ""
    is_island: bool = False


class Fit(NamedTuple):
    """What is left of a room after something moved in, and what it took of which GPU.

    Args:
        broken: how many GPUs that nobody used are shared now.
    """

    room: Room
    gpus: tuple[tuple[int, int], ...]
    broken: int = 0


class Room(NamedTuple):
    """What is free on one machine.

    Args:
        gpus: what is free of each, in thousandths.
    """

    total: Shape
    free: Shape
    gpus: tuple[int, ...]

    def fit(self, wanted: Shape) -> Fit | None:
        """With `wanted` moved in, or None when it does not fit."""
        if not (self.free.holds(wanted) and can_run(self.total, wanted)):
            return None
        if not wanted.milli_gpus:
            return Fit(self._changed(wanted, ()), ())
        positions = self._gpus_for(wanted.milli_gpus)
        return self._with(wanted, positions) if positions else None

    def take(self, wanted: Shape, indices: Sequence[int] = ()) -> Fit:
        """With `wanted` moved in, whether it fits or not: somebody says that it is there."""
        count = max(1, wanted.milli_gpus // WHOLE_GPU)
        if not (wanted.milli_gpus and self.gpus):
            return Fit(self._changed(wanted, ()), ())
        if len(indices) == count and all(0 <= index < len(self.gpus) for index in indices):
            return self._with(wanted, indices)
        emptiest = sorted(range(len(self.gpus)), key=lambda at: (-self.gpus[at], at))[:count]
        return self._with(wanted, self._gpus_for(wanted.milli_gpus) or emptiest)

    def without(self, held: Shape, gpus: tuple[tuple[int, int], ...]) -> Room:
        """After somebody moved out."""
        left = list(self.gpus)
        for position, milli in gpus:
            left[position] += milli
        return Room(self.total, self.free.plus(held), tuple(left))

    def _gpus_for(self, milli: int) -> Sequence[int]:
        """The positions of GPUs that have room: whole ones unused, a share the fullest that still has it."""
        if milli < WHOLE_GPU:
            fitting = [(free, at) for at, free in enumerate(self.gpus) if free >= milli]
            return [min(fitting)[1]] if fitting else []
        unused = [at for at, free in enumerate(self.gpus) if free == WHOLE_GPU]
        count = milli // WHOLE_GPU
        return unused[:count] if len(unused) >= count else []

    def _with(self, wanted: Shape, positions: Sequence[int]) -> Fit:
        each = min(wanted.milli_gpus, WHOLE_GPU)
        taken = tuple((position, each) for position in positions)
        broken = sum(each < WHOLE_GPU and self.gpus[at] == WHOLE_GPU for at in positions)
        return Fit(self._changed(wanted, taken), taken, broken)

    def _changed(self, wanted: Shape, taken: tuple[tuple[int, int], ...]) -> Room:
        if not taken:
            return Room(self.total, self.free.minus(wanted), self.gpus)
        left = list(self.gpus)
        for position, milli in taken:
            left[position] -= milli
        return Room(self.total, self.free.minus(wanted), tuple(left))


def empty_room(total: Shape) -> Room:
    whole, rest = divmod(total.milli_gpus, WHOLE_GPU)
    return Room(total, total, (WHOLE_GPU,) * whole + ((rest,) if rest else ()))


def pack(parts: Parts, rooms: Mapping[str, Room], preferred: Sequence[str] = ()) -> tuple[str, ...]:
    """A node for each part, or nothing when not all of them find one.

    Those that were somewhere before go there again if they fit. Then the node that takes most of the rest is filled,
    and the next, so that few nodes are used; of equals the one that is left with the least, GPUs counted before CPUs
    before memory and unused GPUs not broken where used ones have room, so that large gaps stay whole. This is greedy:
    parts that differ may fit in a way that it does not find.
    """
    left, seats = dict(rooms), [""] * len(parts)
    for rank, node in enumerate(preferred if len(preferred) == len(parts) else ()):
        fit = left[node].fit(parts[rank]) if node in left else None
        if fit:
            left[node], seats[rank] = fit.room, node
    waiting = sorted((rank for rank, seat in enumerate(seats) if not seat), key=lambda rank: parts[rank], reverse=True)
    while waiting:
        best = min((filled for node in left if (filled := _fill(node, left[node], parts, waiting))), default=None)
        if best is None:
            return ()
        left[best.node] = best.room
        for rank in best.ranks:
            seats[rank] = best.node
        waiting = [rank for rank in waiting if not seats[rank]]
    return tuple(seats)


class _Filled(NamedTuple):
    """A node with as many of the waiting as fit; the smallest is the best."""

    left_out: int
    broken: int
    free: Shape
    node: str
    room: Room
    ranks: tuple[int, ...]


def _fill(node: str, room: Room, parts: Parts, waiting: Sequence[int]) -> _Filled | None:
    taken: list[int] = []
    broken = 0
    for rank in waiting:
        fit = room.fit(parts[rank])
        if fit:
            room, broken = fit.room, broken + fit.broken
            taken.append(rank)
    return _Filled(len(waiting) - len(taken), broken, room.free, node, room, tuple(taken)) if taken else None


class Held(NamedTuple):
    """What one process holds on a node.

    Args:
        indices: the GPUs it was given, where that is known.
        lasting: it never ends by itself.
    """

    shape: Shape
    gpus: tuple[tuple[int, int], ...]
    indices: tuple[int, ...]
    lasting: bool


class Cluster:
    """All machines that are known, and what is held on them.

    What is held stays counted while its machine is away, for when it comes back.

    Attributes:
        touched: nodes looked at so far, as a measure of cost.
    """

    def __init__(self) -> None:
        self.touched = 0
        self.total = NOTHING
        self.machines: dict[str, Machine] = {}
        self._rooms: dict[str, Room] = {}
        self._open: dict[str, Room] = {}
        self._held: dict[str, dict[tuple[str, int], Held]] = defaultdict(dict)

    @property
    def has_open(self) -> bool:
        return bool(self._open)

    def apply(self, machines: Mapping[str, Machine]) -> list[str]:
        """Takes in all machines; returns those on which more may fit than before."""
        if machines == self.machines:
            return []
        before, self.machines = self._open, dict(sorted(machines.items()))
        self._rooms = {node: self._rebuilt(node) for node in self.machines}
        self._open = {node: room for node, room in self._rooms.items() if not self.machines[node].closed}
        self.total = NOTHING
        for room in self._open.values():
            self.total = self.total.plus(room.total)
        return [node for node, room in self._open.items() if node not in before or room != before[node]]

    def take(
        self,
        job_id: str,
        parts: Parts,
        node_ids: Sequence[str],
        gpu_indices: Sequence[tuple[int, ...]] = (),
        *,
        lasting: bool = False,
    ) -> None:
        """Counts what a job holds, by rank."""
        for rank, (shape, node) in enumerate(zip(parts, node_ids, strict=True)):
            indices = gpu_indices[rank] if rank < len(gpu_indices) else ()
            held = Held(shape, (), indices, lasting)
            room = self._rooms.get(node)
            if room:
                fit = room.take(shape, indices)
                held = held._replace(gpus=fit.gpus)
                self._change(node, fit.room)
            self._held[node][job_id, rank] = held

    def give_back(self, job_id: str, node_ids: Sequence[str]) -> list[str]:
        """The job holds nothing any more; returns the nodes on which more fits now."""
        for rank, node in enumerate(node_ids):
            held = self._held[node].pop((job_id, rank))
            if not self._held[node]:
                del self._held[node]
            if node in self._rooms:
                self._change(node, self._rooms[node].without(held.shape, held.gpus))
        return [node for node in dict.fromkeys(node_ids) if node in self._open]

    def seats(
        self, parts: Parts, preferred: Sequence[str] = (), kept_back: Collection[str] = frozenset()
    ) -> tuple[str, ...]:
        """A node for each part as things are now; nothing when not all of them fit at once."""
        self.touched += len(self._open)
        rooms = {node: room for node, room in self._open.items() if node not in kept_back} if kept_back else self._open
        return self._pack(parts, rooms, preferred)

    def seats_in_time(self, parts: Parts) -> tuple[str, ...]:
        """Where the parts fit when all work that ends has ended, on the nodes that have most free by now."""
        self.touched += len(self._open)
        chosen: dict[str, Room] = {}
        for node in sorted(self._open, key=lambda each: (self._open[each].free, each), reverse=True):
            chosen[node] = self._lasting_room(node)
            if found := self._pack(parts, chosen):
                return found
        return ()

    def fits_in_part(self, parts: Parts, node: str) -> bool:
        """Whether any of the parts fits on the node now."""
        self.touched += 1
        room = self._open[node]
        return any(room.fit(part) for part in dict.fromkeys(parts))

    def could_hold(self, parts: Parts) -> bool:
        """Whether the machines that take work would have all of it if nobody used them."""
        return bool(self._pack(parts, {node: empty_room(room.total) for node, room in self._open.items()}))

    def keeps_apart(self, parts: Parts) -> bool:
        """Whether the machines would have all of it, also those that take no work now, if only all of their sandboxes
        reached each other.
        """
        if len(parts) == 1 or not any(machine.is_island for machine in self.machines.values()):
            return False
        whole = {node: empty_room(machine.total) for node, machine in self.machines.items()}
        return bool(pack(parts, whole)) and not self._pack(parts, whole)

    def has_gpus(self, parts: Parts) -> bool:
        """Whether some known machine, also one that takes no work now, has each kind of GPU that is asked for."""
        totals = [machine.total for machine in self.machines.values()]
        return all(any(offers(total, part) for total in totals) for part in dict.fromkeys(parts) if part.milli_gpus)

    def open_rooms(self) -> Mapping[str, Room]:
        """What is free on each machine that takes work."""
        return self._open

    def room_on(self, node: str) -> Room:
        return self._rooms[node]

    def held(self) -> Iterator[Shape]:
        """What each process holds on the machines that are known."""
        return (held.shape for node in self.machines for held in self._held.get(node, {}).values())

    def why_too_small(self, shape: Shape) -> str:
        """Of a shape that no machine has, for people: what is missing most plainly."""
        able = [room.total for room in self._open.values() if room.total.images or not shape.images]
        if not able:
            return "runs in a container image, and no node has podman, or images that an administrator unpacked"
        totals = [total for total in able if offers(total, shape)]
        if not totals:
            return f"needs {gpus_text(shape)}, and no node that takes work has such a GPU"
        largest = Shape(*(max(amounts) for amounts in zip(*(total.amounts for total in totals), strict=True)))
        units = (
            (shape.milli_gpus, largest.milli_gpus, lambda milli: gpus_text(Shape(milli, 0, 0))),
            (shape.milli_cpus, largest.milli_cpus, cpus_text),
            (shape.memory_bytes, largest.memory_bytes, memory_text),
        )
        for wanted, most, text in units:
            if wanted > most:
                return f"needs {text(wanted)}, the largest node has {text(most)}"
        return ""

    def _pack(self, parts: Parts, rooms: Mapping[str, Room], preferred: Sequence[str] = ()) -> tuple[str, ...]:
        """As `pack`, but a gang is either where all nodes reach each other, or on one that reaches none."""
        islands = [node for node in rooms if self.machines[node].is_island] if len(parts) > 1 else []
        if not islands:
            return pack(parts, rooms, preferred)
        mainland = {node: room for node, room in rooms.items() if node not in islands}
        groups = [mainland, *({node: rooms[node]} for node in sorted(islands))]
        return next((seats for group in groups if (seats := pack(parts, group, preferred))), ())

    def _change(self, node: str, room: Room) -> None:
        self._rooms[node] = room
        if node in self._open:
            self._open[node] = room

    def _rebuilt(self, node: str) -> Room:
        """The room of a machine that is new or changed, those first whose GPUs are known."""
        room = empty_room(self.machines[node].total)
        held = self._held.get(node, {})
        for key in sorted(held, key=lambda each: (not held[each].indices, each)):
            fit = room.take(held[key].shape, held[key].indices)
            held[key] = held[key]._replace(gpus=fit.gpus)
            room = fit.room
        return room

    def _lasting_room(self, node: str) -> Room:
        room = empty_room(self.machines[node].total)
        held = self._held.get(node, {})
        for key in sorted(held):
            if held[key].lasting:
                room = room.take(held[key].shape, held[key].indices).room
        return room
