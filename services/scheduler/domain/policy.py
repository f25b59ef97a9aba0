"""Who gets which machines next: deterministic, without I/O, and kept in step change by change.

The order: the higher priority first; among equals the team that holds the smallest share of the cluster; within a
team the older job. A job that fits nowhere now lets later ones of another shape pass.

Gangs: all processes of a job are placed at once or none is, on few nodes (see `cluster.pack`). So that small jobs do
not take each bit of room before a gang finds enough, the first gang that waits, by priority and age, keeps nodes
back: those where it fits once the work on them has ended. Nothing of its own priority or below is placed there until
it runs. One gang keeps back at a time, and only where work ends by itself: a replica would hold it up for ever.

The cost: jobs that ask for the same with the same priority (their kind) stand in one line, and a kind that was found
not to fit is not looked at again until room appears where it would. So a decision costs what changed since the last,
times the number of kinds and nodes, whatever the length of the queue.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

from services.scheduler.domain.cluster import Cluster, Machine
from services.scheduler.domain.model import DEFAULT_PRIORITY
from services.scheduler.domain.shapes import NOTHING, Parts, Shape, parts_text, summed

APART = (
    "on several nodes its ranks could not reach each other, as sandboxes there have loopback only. Ask for less, or "
    "give sandboxes a network: `apt-get install passt`, or run the platform as root with nftables and iproute2"
)


@dataclass(frozen=True, slots=True)
class Demand:
    """One job that waits for machines, or holds part of some.

    Args:
        parts: what each of its processes asks for, by rank.
        order: the smaller is served first within a team and priority: when the job was created.
        ready_us: not to be placed before.
        give_up_us: not to wait any longer; 0 for never.
        hold: why it must not be placed, for people.
        node_ids: where its processes are, by rank; empty while it waits.
        gpu_indices: which GPUs they were given, by rank, as far as that is known.
        preferred: where its processes were the last time.
        lasting: it does not end by itself, so nothing can wait for its end.
    """

    job_id: str
    team_id: str
    parts: Parts
    order: int
    priority: int = DEFAULT_PRIORITY
    ready_us: int = 0
    give_up_us: int = 0
    hold: str = ""
    node_ids: tuple[str, ...] = ()
    gpu_indices: tuple[tuple[int, ...], ...] = ()
    preferred: tuple[str, ...] = ()
    lasting: bool = False

    @property
    def kind(self) -> Kind:
        return Kind(self.priority, self.parts)

    @property
    def place(self) -> Place:
        return Place(-self.priority, self.order, self.job_id)

    @property
    def is_in_line(self) -> bool:
        return not (self.node_ids or self.ready_us or self.hold)


class Placement(NamedTuple):
    """A node for each of the job's processes, by rank."""

    job_id: str
    node_ids: tuple[str, ...]


class Kind(NamedTuple):
    """Jobs of one kind are placed, or not, for the same reasons."""

    priority: int
    parts: Parts


class Place(NamedTuple):
    """A place in the queue; the smaller is before."""

    negative_priority: int
    order: int
    job_id: str


class KeptBack(NamedTuple):
    """Nodes that are kept free for a gang, and for others of its kind: which of them is first is the order's matter."""

    place: Place
    kind: Kind
    node_ids: frozenset[str]


@dataclass(slots=True)
class _Line:
    """A team's jobs of one kind. Who leaves from the middle stays in the heap until it comes to the front.

    Args:
        length: how many of them still wait.
    """

    heap: list[tuple[int, str]] = field(default_factory=list)
    length: int = 0


def never(_parts: Parts) -> bool:
    """Of a cluster of fixed size."""
    return False


class Policy:
    """The live queue and what is free.

    Args:
        could_come: whether nodes may come, of themselves, that have what no present node has.
    """

    def __init__(self, could_come: Callable[[Parts], bool] = never) -> None:
        self.cluster = Cluster()
        self._could_come = could_come
        self._touched = 0
        self._demands: dict[str, Demand] = {}
        self._lines: dict[tuple[str, Kind], _Line] = defaultdict(_Line)
        self._teams_of: dict[Kind, set[str]] = defaultdict(set)
        self._to_try: dict[tuple[int, str], set[Kind]] = defaultdict(set)
        self._blocked: set[Kind] = set()
        self._kept_back: KeptBack | None = None
        self._later: list[tuple[int, str]] = []
        self._giving_up: list[tuple[int, str]] = []
        self._unexplained: dict[str, None] = {}
        self._nodes_detail = ""
        self._used_by: dict[str, Shape] = defaultdict(lambda: NOTHING)
        self._holding = 0

    @property
    def touched(self) -> int:
        """Entries looked at so far: jobs, kinds, teams and nodes. A measure of cost that no clock disturbs."""
        return self._touched + self.cluster.touched

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._demands) - self._holding

    @property
    def next_ready_us(self) -> int | None:
        """When the next postponed job may be placed, or the next waiting one is to be given up."""
        moments = [heap[0][0] for heap in (self._later, self._giving_up) if heap]
        return min(moments, default=None)

    @property
    def kept_back(self) -> KeptBack | None:
        return self._kept_back

    def apply(self, demand: Demand) -> None:
        """Takes in a new or changed job; the same again changes nothing."""
        if self._demands.get(demand.job_id) == demand:
            return
        self.forget(demand.job_id)
        self._demands[demand.job_id] = demand
        if demand.node_ids:
            self._take(demand)
            return
        if demand.give_up_us:
            heapq.heappush(self._giving_up, (demand.give_up_us, demand.job_id))
        if demand.hold:
            self._unexplained[demand.job_id] = None
        elif demand.ready_us:
            heapq.heappush(self._later, (demand.ready_us, demand.job_id))
        else:
            self._line_up(demand)

    def forget(self, job_id: str) -> None:
        """The job neither waits nor holds anything any more."""
        demand = self._demands.pop(job_id, None)
        self._unexplained.pop(job_id, None)
        if demand and demand.node_ids:
            self._give_back(demand)
        elif demand and demand.is_in_line:
            self._step_out(demand)

    def apply_nodes(self, machines: Mapping[str, Machine], detail: str) -> None:
        """Takes in all nodes that are known.

        Args:
            detail: why there is none, for people.
        """
        self._nodes_detail = detail
        if machines == self.cluster.machines:
            return
        grown = self.cluster.apply(machines)
        # The gang may fit elsewhere now, or nowhere.
        grown += self._let_go()
        self._unblock(grown)

    def decide(self, now_us: int, limit: int = 100) -> list[Placement]:
        """Up to `limit` placements, already counted as held; fewer means that nothing else fits now."""
        self._ripen(now_us)
        placements: list[Placement] = []
        # Again while the end of a keeping back lets others try.
        while self._to_try and len(placements) < limit:
            placements += self._round(limit - len(placements))
        return placements

    def _round(self, limit: int) -> list[Placement]:
        """Each team at each priority in its turn, until none of them has something that fits."""
        groups = [self._turn(priority, team) for priority, team in self._to_try]
        heapq.heapify(groups)
        placements: list[Placement] = []
        while groups and len(placements) < limit:
            negative_priority, share, team = heapq.heappop(groups)
            self._touched += 1
            turn = self._turn(-negative_priority, team)
            if turn[1] != share:
                # The team has got something at another priority meanwhile.
                heapq.heappush(groups, turn)
                continue
            placement = self._place_next(-negative_priority, team)
            if placement:
                placements.append(placement)
                heapq.heappush(groups, self._turn(-negative_priority, team))
        return placements

    def given_up(self, now_us: int, limit: int = 100) -> list[str]:
        """Up to `limit` jobs that have waited as long as they may; each is told once."""
        found: list[str] = []
        while self._giving_up and self._giving_up[0][0] <= now_us and len(found) < limit:
            give_up_us, job_id = heapq.heappop(self._giving_up)
            self._touched += 1
            demand = self._demands.get(job_id)
            if demand and not demand.node_ids and demand.give_up_us == give_up_us:
                found.append(job_id)
        return list(dict.fromkeys(found))

    @property
    def has_unexplained(self) -> bool:
        """Whether jobs came to wait of which nobody has been told why."""
        return bool(self._unexplained)

    def newly_blocked(self, limit: int = 100) -> dict[str, str]:
        """Up to `limit` jobs that came to wait and fit nowhere, with the reason; each is told once.

        A job whose kind is still to be tried is left for later: the next decision may place it.
        """
        first = islice(self._unexplained, limit)
        blocked = [job_id for job_id in first if self._is_blocked(self._demands[job_id])]
        for job_id in blocked:
            del self._unexplained[job_id]
        return {job_id: self.why_waiting(job_id) for job_id in blocked}

    def why_waiting(self, job_id: str) -> str:
        """Why this job is not placed, for people; empty for one that does not wait, or waits for its time."""
        demand = self._demands.get(job_id)
        if demand is None or demand.node_ids:
            return ""
        if demand.hold or demand.ready_us:
            return demand.hold
        if not self.cluster.has_open:
            return f"no node is ready: {self._nodes_detail}" if self._nodes_detail else "no node is ready"
        return self._why_not(demand)

    def why_hopeless(self, job_id: str) -> str:
        """Why no machine will ever run it, for people; empty while there is hope.

        Only kinds of GPUs are hopeless: of all else there may be more tomorrow, and a mistyped model there may not.
        And ranks that would lie on nodes which do not reach each other: that is what the nodes are, not what is free.
        A machine that is away, or is being drained, still counts as having them.
        """
        demand = self._demands.get(job_id)
        if demand is None or demand.node_ids or not self.cluster.has_open:
            return ""
        if self.cluster.keeps_apart(demand.parts) and not self._could_come(demand.parts):
            return f"needs {parts_text(demand.parts)}, which no node has alone; {APART}"
        if self.cluster.has_gpus(demand.parts) or self._could_come(demand.parts):
            return ""
        known = sorted({each.total.gpu_model for each in self.cluster.machines.values() if each.total.gpu_model})
        there = f"the GPUs here are {', '.join(known)}" if known else "no node has a GPU whose model is known"
        return f"needs {parts_text(self._lacking(demand.parts))}, and no node has such a GPU; {there}"

    def unmet(self, limit: int = 100) -> dict[Parts, int]:
        """What is asked for that no present node can take now, and by how many jobs."""
        found: dict[Parts, int] = defaultdict(int)
        for kind in sorted(self._blocked, reverse=True):
            if kind.parts in found or len(found) < limit:
                found[kind.parts] += sum(self._lines[team, kind].length for team in self._teams_of[kind])
        return dict(found)

    def demand(self, job_id: str) -> Demand | None:
        return self._demands.get(job_id)

    def before(self, job_id: str) -> int:
        """How many jobs come before this one by priority and age. Looks at its whole priority: for people who ask."""
        mine = self._demands[job_id]
        higher = sum(line.length for (_, kind), line in self._lines.items() if kind.priority > mine.priority)
        level = (line for (_, kind), line in self._lines.items() if kind.priority == mine.priority)
        older = (
            other
            for line in level
            for order, other in line.heap
            if (order, other) < (mine.order, job_id) and self._stands(order, other)
        )
        return higher + len(set(older))

    def nodes_kept_from(self, demand: Demand) -> Collection[str]:
        """The nodes that others have kept back from this job."""
        kept = self._kept_back
        if kept is None or kept.kind == demand.kind or kept.kind.priority < demand.priority:
            return frozenset()
        return kept.node_ids

    def share(self, team: str) -> float:
        """The largest share that the team holds of any resource."""
        amounts = zip(self._used_by[team].amounts, self.cluster.total.amounts, strict=True)
        return max((mine / all_ for mine, all_ in amounts if all_), default=0.0)

    def _is_blocked(self, demand: Demand) -> bool:
        return bool(demand.hold) or demand.kind in self._blocked

    def _why_not(self, demand: Demand) -> str:
        cluster, parts = self.cluster, demand.parts
        alone = next((why for part in dict.fromkeys(parts) if (why := cluster.why_too_small(part))), "")
        if alone:
            return alone
        if cluster.keeps_apart(parts):
            return f"needs {parts_text(parts)}, which no node has alone; {APART}"
        if not cluster.could_hold(parts):
            return f"needs {parts_text(parts)}{_where(parts)}, and {_nobody(parts)}"
        kept = self.nodes_kept_from(demand)
        if kept and cluster.seats(parts):
            count = "1 node is" if len(kept) == 1 else f"{len(kept)} nodes are"
            return f"{count} kept free for a job of several processes that came before"
        return f"waits for {parts_text(parts)} to become free{_where(parts) or ' at once'}"

    def _lacking(self, parts: Parts) -> Parts:
        return tuple(part for part in dict.fromkeys(parts) if not self.cluster.has_gpus((part,)))[:1]

    def _line_up(self, demand: Demand) -> None:
        self._touched += 1
        line = self._lines[demand.team_id, demand.kind]
        heapq.heappush(line.heap, (demand.order, demand.job_id))
        line.length += 1
        self._teams_of[demand.kind].add(demand.team_id)
        self._unexplained[demand.job_id] = None
        if demand.kind not in self._blocked:
            self._to_try[demand.priority, demand.team_id].add(demand.kind)
        elif len(demand.parts) > 1:
            self._keep_back_for(demand)

    def _step_out(self, demand: Demand) -> None:
        kind, team = demand.kind, demand.team_id
        line = self._lines[team, kind]
        line.length -= 1
        if not line.length:
            del self._lines[team, kind]
            self._to_try[kind.priority, team].discard(kind)
            self._teams_of[kind].discard(team)
            if not self._teams_of[kind]:
                del self._teams_of[kind]
                self._blocked.discard(kind)
        if self._kept_back and self._kept_back.place == demand.place:
            self._unblock(self._let_go())

    def _ripen(self, now_us: int) -> None:
        """Lets postponed jobs whose time has come stand in line."""
        while self._later and self._later[0][0] <= now_us:
            ready_us, job_id = heapq.heappop(self._later)
            self._touched += 1
            demand = self._demands.get(job_id)
            if demand and demand.ready_us == ready_us and not (demand.node_ids or demand.hold):
                ripe = replace(demand, ready_us=0)
                self._demands[job_id] = ripe
                self._line_up(ripe)

    def _turn(self, priority: int, team: str) -> tuple[int, float, str]:
        return -priority, self.share(team), team

    def _place_next(self, priority: int, team: str) -> Placement | None:
        """Places the team's oldest job that fits; without one the team has nothing to try at this priority."""
        while first := self._oldest(priority, team):
            node_ids = self.cluster.seats(first.parts, first.preferred, self.nodes_kept_from(first))
            if node_ids:
                return self._place(first, node_ids)
            self._block(first)
        self._to_try.pop((priority, team), None)
        return None

    def _oldest(self, priority: int, team: str) -> Demand | None:
        """The team's oldest job of a kind that is still to be tried."""
        heads: list[tuple[int, str]] = []
        for kind in list(self._to_try.get((priority, team), ())):
            self._touched += 1
            if kind in self._blocked:
                self._to_try[priority, team].discard(kind)
            else:
                heads.append(self._head(self._lines[team, kind]))
        return self._demands[min(heads)[1]] if heads else None

    def _head(self, line: _Line) -> tuple[int, str]:
        """The first of a line, after dropping those who have left it."""
        while not self._stands(*line.heap[0]):
            self._touched += 1
            heapq.heappop(line.heap)
        self._touched += 1
        return line.heap[0]

    def _stands(self, order: int, job_id: str) -> bool:
        demand = self._demands.get(job_id)
        return demand is not None and demand.order == order and demand.is_in_line

    def _place(self, waiting: Demand, node_ids: tuple[str, ...]) -> Placement:
        heapq.heappop(self._lines[waiting.team_id, waiting.kind].heap)
        held = replace(waiting, node_ids=node_ids)
        self._demands[waiting.job_id] = held
        self._unexplained.pop(waiting.job_id, None)
        self._take(held)
        self._step_out(waiting)
        return Placement(waiting.job_id, node_ids)

    def _block(self, demand: Demand) -> None:
        """Nothing of this kind fits now."""
        self._blocked.add(demand.kind)
        self._to_try[demand.priority, demand.team_id].discard(demand.kind)
        if len(demand.parts) > 1:
            self._keep_back_for(demand)

    def _keep_back_for(self, gang: Demand) -> None:
        """Lets the gang keep nodes back, unless one that comes before it does."""
        if self._kept_back and self._kept_back.place <= gang.place:
            return
        node_ids = frozenset(self.cluster.seats_in_time(gang.parts))
        if not node_ids:
            return
        released = self._kept_back.node_ids - node_ids if self._kept_back else frozenset()
        self._kept_back = KeptBack(gang.place, gang.kind, node_ids)
        self._unblock(sorted(released))

    def _let_go(self) -> list[str]:
        """Ends the keeping back; the next gang in order keeps back in its turn. Returns the nodes set free."""
        released, self._kept_back = (self._kept_back.node_ids if self._kept_back else frozenset()), None
        gangs = [kind for kind in self._blocked if len(kind.parts) > 1]
        heads = [self._head(self._lines[team, kind]) for kind in gangs for team in self._teams_of[kind]]
        for gang in sorted((self._demands[job_id] for _, job_id in heads), key=lambda each: each.place):
            if self._kept_back is None:
                self._keep_back_for(gang)
        return sorted(node for node in released if node in self.cluster.open_rooms())

    def _take(self, demand: Demand) -> None:
        self._holding += 1
        self.cluster.take(demand.job_id, demand.parts, demand.node_ids, demand.gpu_indices, lasting=demand.lasting)
        self._used_by[demand.team_id] = self._used_by[demand.team_id].plus(summed(demand.parts))

    def _give_back(self, demand: Demand) -> None:
        self._holding -= 1
        self._used_by[demand.team_id] = self._used_by[demand.team_id].minus(summed(demand.parts))
        self._unblock(self.cluster.give_back(demand.job_id, demand.node_ids))

    def _unblock(self, nodes: Sequence[str]) -> None:
        """Lets the kinds that fit what is free on these nodes now be tried again."""
        for node in nodes:
            for kind in list(self._blocked):
                if self.cluster.fits_in_part(kind.parts, node):
                    self._blocked.discard(kind)
                    for team in self._teams_of[kind]:
                        self._to_try[kind.priority, team].add(kind)


def _where(parts: Parts) -> str:
    return " on one node" if len(parts) == 1 else ""


def _nobody(parts: Parts) -> str:
    return "no node has all of it" if len(parts) == 1 else "all nodes together have not"
