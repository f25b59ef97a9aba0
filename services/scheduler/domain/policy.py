"""Who gets which machine next: deterministic, without I/O, and kept in step change by change.

The order: a team that holds the smallest share of the cluster goes first; within a team the oldest job goes first,
and a job that fits nowhere now lets later ones of another shape pass. The node: the one that is left with the
least free, GPUs counted before CPUs before memory, so that large gaps stay whole.

The cost: jobs that ask for the same (their shape) stand in one line, and a shape that was found not to fit is not
looked at again until room appears where it would. So a decision costs what changed since the last, times the
number of shapes and nodes, whatever the length of the queue.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

from services.scheduler.domain.lifecycles import memory_text


class Shape(NamedTuple):
    """An amount of each resource, in whole numbers so that sums are exact."""

    milli_gpus: int
    milli_cpus: int
    memory_bytes: int

    def plus(self, other: Shape) -> Shape:
        return Shape(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def minus(self, other: Shape) -> Shape:
        return Shape(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))

    def holds(self, other: Shape) -> bool:
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


NOTHING = Shape(0, 0, 0)


def shape_of(cpu_count: float, memory_bytes: int, gpu_count: float) -> Shape:
    return Shape(round(gpu_count * 1000), round(cpu_count * 1000), memory_bytes)


@dataclass(frozen=True, slots=True)
class Demand:
    """One job that waits for a machine, or holds part of one.

    Args:
        order: the smaller is served first within a team and shape: when the job was created.
        ready_us: not to be placed before.
        node_id: where it holds `shape`; empty while it waits.
    """

    job_id: str
    team_id: str
    shape: Shape
    order: int
    ready_us: int = 0
    node_id: str = ""


class Placement(NamedTuple):
    job_id: str
    node_id: str


@dataclass(slots=True)
class _Line:
    """A team's jobs of one shape. Who leaves from the middle stays in the heap until it comes to the front.

    Args:
        length: how many of them still wait.
    """

    heap: list[tuple[int, str]] = field(default_factory=list)
    length: int = 0


class Policy:
    """The live queue and what is free.

    Attributes:
        touched: entries looked at so far: jobs, shapes, teams and nodes. A measure of cost that no clock disturbs.
    """

    def __init__(self) -> None:
        self.touched = 0
        self._demands: dict[str, Demand] = {}
        self._lines: dict[tuple[str, Shape], _Line] = defaultdict(_Line)
        self._teams_of: dict[Shape, set[str]] = defaultdict(set)
        self._to_try: dict[str, set[Shape]] = defaultdict(set)
        self._blocked: set[Shape] = set()
        self._later: list[tuple[int, str]] = []
        self._unexplained: dict[str, None] = {}
        self._totals: dict[str, Shape] = {}
        self._cluster = NOTHING
        self._nodes_detail = ""
        self._used_on: dict[str, Shape] = defaultdict(lambda: NOTHING)
        self._used_by: dict[str, Shape] = defaultdict(lambda: NOTHING)
        self._holding = 0

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._demands) - self._holding

    @property
    def next_ready_us(self) -> int | None:
        """When the next postponed job may be placed."""
        return self._later[0][0] if self._later else None

    def apply(self, demand: Demand) -> None:
        """Takes in a new or changed job; the same again changes nothing."""
        if self._demands.get(demand.job_id) == demand:
            return
        self.forget(demand.job_id)
        self._demands[demand.job_id] = demand
        if demand.node_id:
            self._take(demand)
        elif demand.ready_us:
            heapq.heappush(self._later, (demand.ready_us, demand.job_id))
        else:
            self._line_up(demand)

    def forget(self, job_id: str) -> None:
        """The job neither waits nor holds anything any more."""
        demand = self._demands.pop(job_id, None)
        self._unexplained.pop(job_id, None)
        if demand and demand.node_id:
            self._give_back(demand)
        elif demand and _in_line(demand):
            self._step_out(demand)

    def apply_nodes(self, totals: dict[str, Shape], detail: str) -> None:
        """Takes in all nodes that may be placed on.

        Args:
            detail: why there is none, for people.
        """
        self._nodes_detail = detail
        if totals == self._totals:
            return
        grown = [node for node, total in totals.items() if not self._totals.get(node, NOTHING).holds(total)]
        # Sorted, so that nothing depends on the order in which nodes were reported.
        self._totals = dict(sorted(totals.items()))
        self._cluster = NOTHING
        for total in totals.values():
            self._cluster = self._cluster.plus(total)
        for node in grown:
            self._unblock(node)

    def decide(self, now_us: int, limit: int = 100) -> list[Placement]:
        """Up to `limit` placements, already counted as held; fewer means that nothing else fits now."""
        self._ripen(now_us)
        teams = [(self._share(team), team) for team in self._to_try]
        heapq.heapify(teams)
        placements: list[Placement] = []
        while teams and len(placements) < limit:
            _, team = heapq.heappop(teams)
            self.touched += 1
            placement = self._place_next(team)
            if placement:
                placements.append(placement)
                heapq.heappush(teams, (self._share(team), team))
        return placements

    @property
    def has_unexplained(self) -> bool:
        """Whether jobs came to wait of which nobody has been told why."""
        return bool(self._unexplained)

    def newly_blocked(self, limit: int = 100) -> dict[str, str]:
        """Up to `limit` jobs that came to wait and fit nowhere, with the reason; each is told once.

        A job whose shape is still to be tried is left for later: the next decision may place it.
        """
        first = islice(self._unexplained, limit)
        blocked = [job_id for job_id in first if self._demands[job_id].shape in self._blocked]
        for job_id in blocked:
            del self._unexplained[job_id]
        return {job_id: self.why_waiting(job_id) for job_id in blocked}

    def why_waiting(self, job_id: str) -> str:
        """Why this job is not placed, for people; empty for one that does not wait, or waits for its time."""
        demand = self._demands.get(job_id)
        if demand is None or demand.node_id or demand.ready_us:
            return ""
        if not self._totals:
            return f"no node is ready: {self._nodes_detail}" if self._nodes_detail else "no node is ready"
        if not any(total.holds(demand.shape) for total in self._totals.values()):
            return self._why_never(demand.shape)
        return f"waits for {_text(demand.shape)} to become free on one node"

    def _why_never(self, shape: Shape) -> str:
        largest = Shape(*(max(amounts) for amounts in zip(*self._totals.values(), strict=True)))
        units = (
            (shape.milli_gpus, largest.milli_gpus, _gpus),
            (shape.milli_cpus, largest.milli_cpus, _cpus),
            (shape.memory_bytes, largest.memory_bytes, memory_text),
        )
        for wanted, most, text in units:
            if wanted > most:
                return f"needs {text(wanted)}, the largest node has {text(most)}"
        return f"needs {_text(shape)} on one node, and no node has all of it"

    def _line_up(self, demand: Demand) -> None:
        self.touched += 1
        line = self._lines[demand.team_id, demand.shape]
        heapq.heappush(line.heap, (demand.order, demand.job_id))
        line.length += 1
        self._teams_of[demand.shape].add(demand.team_id)
        self._unexplained[demand.job_id] = None
        if demand.shape not in self._blocked:
            self._to_try[demand.team_id].add(demand.shape)

    def _step_out(self, demand: Demand) -> None:
        line = self._lines[demand.team_id, demand.shape]
        line.length -= 1
        if line.length:
            return
        del self._lines[demand.team_id, demand.shape]
        self._to_try[demand.team_id].discard(demand.shape)
        self._teams_of[demand.shape].discard(demand.team_id)
        if not self._teams_of[demand.shape]:
            del self._teams_of[demand.shape]
            self._blocked.discard(demand.shape)

    def _ripen(self, now_us: int) -> None:
        """Lets postponed jobs whose time has come stand in line."""
        while self._later and self._later[0][0] <= now_us:
            ready_us, job_id = heapq.heappop(self._later)
            self.touched += 1
            demand = self._demands.get(job_id)
            if demand and demand.ready_us == ready_us and not demand.node_id:
                ripe = replace(demand, ready_us=0)
                self._demands[job_id] = ripe
                self._line_up(ripe)

    def _place_next(self, team: str) -> Placement | None:
        """Places the team's oldest job that fits; without one the team has nothing to try any more."""
        while shape := self._oldest_shape(team):
            node = self._best_node(shape)
            if node:
                return self._place(team, shape, node)
            self._blocked.add(shape)
            self._to_try[team].discard(shape)
        self._to_try.pop(team, None)
        return None

    def _oldest_shape(self, team: str) -> Shape | None:
        """The shape, of those to try, whose first job is the team's oldest."""
        heads: list[tuple[tuple[int, str], Shape]] = []
        for shape in list(self._to_try.get(team, ())):
            self.touched += 1
            if shape in self._blocked:
                self._to_try[team].discard(shape)
            else:
                heads.append((self._head(self._lines[team, shape]), shape))
        return min(heads)[1] if heads else None

    def _head(self, line: _Line) -> tuple[int, str]:
        """The first of a line, after dropping those who have left it."""
        while True:
            self.touched += 1
            order, job_id = line.heap[0]
            demand = self._demands.get(job_id)
            if demand and demand.order == order and _in_line(demand):
                return line.heap[0]
            heapq.heappop(line.heap)

    def _best_node(self, shape: Shape) -> str | None:
        fitting: list[tuple[Shape, str]] = []
        for node, total in self._totals.items():
            self.touched += 1
            free = total.minus(self._used_on[node])
            if free.holds(shape):
                fitting.append((free.minus(shape), node))
        return min(fitting)[1] if fitting else None

    def _place(self, team: str, shape: Shape, node: str) -> Placement:
        _, job_id = heapq.heappop(self._lines[team, shape].heap)
        waiting = self._demands[job_id]
        self._step_out(waiting)
        self._unexplained.pop(job_id, None)
        held = replace(waiting, node_id=node)
        self._demands[job_id] = held
        self._take(held)
        return Placement(job_id, node)

    def _take(self, demand: Demand) -> None:
        self._holding += 1
        self._used_on[demand.node_id] = self._used_on[demand.node_id].plus(demand.shape)
        self._used_by[demand.team_id] = self._used_by[demand.team_id].plus(demand.shape)

    def _give_back(self, demand: Demand) -> None:
        self._holding -= 1
        self._used_on[demand.node_id] = self._used_on[demand.node_id].minus(demand.shape)
        self._used_by[demand.team_id] = self._used_by[demand.team_id].minus(demand.shape)
        if demand.node_id in self._totals:
            self._unblock(demand.node_id)

    def _unblock(self, node: str) -> None:
        """Lets the shapes that fit what is free on the node now be tried again."""
        free = self._totals[node].minus(self._used_on[node])
        for shape in list(self._blocked):
            self.touched += 1
            if free.holds(shape):
                self._blocked.discard(shape)
                for team in self._teams_of[shape]:
                    self._to_try[team].add(shape)

    def _share(self, team: str) -> float:
        """The largest share that the team holds of any resource."""
        used = self._used_by[team]
        return max((mine / all_ for mine, all_ in zip(used, self._cluster, strict=True) if all_), default=0.0)


def _in_line(demand: Demand) -> bool:
    return not demand.node_id and not demand.ready_us


def _gpus(milli: int) -> str:
    return "1 GPU" if milli == 1000 else f"{milli / 1000:g} GPUs"


def _cpus(milli: int) -> str:
    return "1 CPU" if milli == 1000 else f"{milli / 1000:g} CPUs"


def _text(shape: Shape) -> str:
    parts = [_gpus(shape.milli_gpus)] if shape.milli_gpus else []
    parts.append(_cpus(shape.milli_cpus))
    parts += [memory_text(shape.memory_bytes)] if shape.memory_bytes else []
    return ", ".join(parts)
