"""Samples what a node's attempts use, every second while it changes, and has the registry keep it.

Five hundred jobs that sleep must cost next to nothing: one that stood still is looked at half as often each time, down
to every tenth second, by one small read. What the registry does not take for a while is lost, oldest first: usage is
no history that anything depends on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from libs.common.clock import from_us, utc_now
from libs.common.contracts.messages import Point, RecordUsage, Usage
from libs.common.errors import Refusal
from services.executor.adapters.agent.gpus import GpuMeter, load_nvml
from services.executor.adapters.agent.usage import Meter, Reading, Subject, rates
from services.executor.adapters.attempts.processes import Tree

SAMPLE_S = 1.0
SHIP_S = 3.0
# Of seconds since the start: what is thinned later keeps each tenth.
INTERVALS_S = (1, 2, 5, 10)
STILL_PERCENT = 0.5
STILL_SHARE = 0.02
WAITING_POINTS = 3_000

log = logging.getLogger(__name__)
Send = Callable[[RecordUsage, str], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Metered:
    """A running attempt, as far as metering must know it."""

    subject: Subject
    team_id: str
    job_id: str
    number: int
    gpu_indices: tuple[int, ...]
    started_us: int


@dataclass(slots=True)
class Watch:
    """One attempt over time."""

    attempt: Metered
    meter: Meter
    last: Reading | None = None
    last_at_s: float = 0.0
    shown: dict[str, float] = field(default_factory=dict)
    due_step: int = 0
    slowness: int = 0
    points: deque[Point] = field(default_factory=lambda: deque(maxlen=WAITING_POINTS))

    def sample(self, gpus: GpuMeter, tree: Tree, now_us: int) -> None:
        """Reads the attempt when it is its turn."""
        step = (now_us - self.attempt.started_us) // 1_000_000
        if step < self.due_step:
            return
        now_s = time.monotonic()
        if self.last is None or not self._stood_still(now_s):
            self._read(gpus, tree, step, now_us, now_s)
        interval = INTERVALS_S[self.slowness]
        self.due_step = (step // interval + 1) * interval

    def _stood_still(self, now_s: float) -> bool:
        """By the CPU alone, which a sleeping job does not use: nothing else is read then."""
        if self.last is None or not self.shown or self.slowness < len(INTERVALS_S) - 1:
            return False
        percent = (self.meter.cpu_s() - self.last.cpu_s) / max(now_s - self.last_at_s, 1e-3) * 100
        return percent < STILL_PERCENT

    def _read(self, gpus: GpuMeter, tree: Tree, step: int, now_us: int, now_s: float) -> None:
        reading = self.meter.read(tree)
        before, passed_s = self.last, now_s - self.last_at_s
        self.last, self.last_at_s = reading, now_s
        if before is None:
            return
        shown = rates(before, reading, max(passed_s, 1e-3)) | gpus.read(self.attempt.gpu_indices)
        if _is_still(self.shown, shown):
            self.slowness = min(self.slowness + 1, len(INTERVALS_S) - 1)
        else:
            self.slowness = 0
        self.shown = shown
        at = from_us(now_us)
        self.points.extend(Point(name=name, value=value, step=step, at=at) for name, value in shown.items())


class Metering:
    """Samples the attempts of one node and ships what was seen, a message for each team.

    Args:
        present: the attempts that run just now.
        send: has the registry keep it, on behalf of a team.
        gpus: the driver's own, unless told otherwise.
    """

    def __init__(self, present: Callable[[], Iterable[Metered]], send: Send, gpus: GpuMeter | None = None) -> None:
        self._present = present
        self._send = send
        self._gpus = gpus or GpuMeter(load_nvml())
        self._watches: dict[str, Watch] = {}

    async def run(self) -> None:
        ship_at_s = time.monotonic() + SHIP_S
        while True:
            # On whole seconds, so that what stands still is read at the same steps by everybody.
            await asyncio.sleep(SAMPLE_S - time.time() % SAMPLE_S)
            try:
                await self.sample()
                if time.monotonic() >= ship_at_s:
                    await self.ship()
                    ship_at_s = time.monotonic() + SHIP_S
            except Exception:  # metering is nothing that an agent should fail for
                log.exception("usage is not recorded; trying again")

    async def sample(self) -> None:
        present = {attempt.subject.attempt_id: attempt for attempt in self._present()}
        await asyncio.to_thread(self._sample, present, time.time_ns() // 1000)

    def _sample(self, present: dict[str, Metered], now_us: int) -> None:
        tree = Tree()
        for attempt_id, attempt in present.items():
            if attempt_id not in self._watches:
                self._watches[attempt_id] = Watch(attempt, Meter(attempt.subject))
            self._watches[attempt_id].sample(self._gpus, tree, now_us)
        for attempt_id in self._watches.keys() - present.keys():
            if not self._watches[attempt_id].points:
                del self._watches[attempt_id]

    async def ship(self) -> None:
        """What the registry refuses or does not answer to waits for the next time."""
        by_team: dict[str, list[Watch]] = defaultdict(list)
        for watch in self._watches.values():
            if watch.points:
                by_team[watch.attempt.team_id].append(watch)
        for team_id, watches in by_team.items():
            for some in _messages(watches):
                await self._ship(team_id, some)

    async def _ship(self, team_id: str, watches: Sequence[Watch]) -> None:
        sent = {watch.attempt.subject.attempt_id: tuple(watch.points) for watch in watches}
        usages = tuple(
            Usage(job_id=w.attempt.job_id, attempt=w.attempt.number, points=sent[w.attempt.subject.attempt_id])
            for w in watches
        )
        try:
            await self._send(RecordUsage(usages=usages), team_id)
        except Refusal as error:
            log.warning("usage is not recorded yet", extra={"reason": str(error), "at": utc_now().isoformat()})
            return
        for watch in watches:
            for _ in sent[watch.attempt.subject.attempt_id]:
                watch.points.popleft()


def _messages(watches: Sequence[Watch]) -> Iterable[list[Watch]]:
    """So many attempts a message that it fits the bus."""
    some: list[Watch] = []
    for watch in watches:
        some.append(watch)
        if sum(len(each.points) for each in some) >= WAITING_POINTS:
            yield some
            some = []
    if some:
        yield some


def _is_still(before: dict[str, float], now: dict[str, float]) -> bool:
    if before.keys() != now.keys():
        return False
    return all(abs(now[name] - before[name]) <= max(STILL_SHARE * abs(before[name]), _least(name)) for name in now)


def _least(name: str) -> float:
    return STILL_PERCENT if name.endswith("percent") else 100_000.0 if name.endswith("bytes") else 1_000.0
