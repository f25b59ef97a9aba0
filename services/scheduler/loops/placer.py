"""The placing loop: keeps the policy's picture in step with the database, and turns its decisions into commits.

The picture is only a cache. It is built from the database at the start, follows what each commit changed, and a
placement that the database does not confirm is read again from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

from opentelemetry.metrics import CallbackOptions, Observation
from sqlalchemy.exc import DBAPIError

from libs.common.clock import Clock, to_us, utc_now
from libs.common.contracts.messages import Node
from libs.common.errors import StaleRevision
from libs.common.ids import new_id
from libs.common.telemetry import meter, span
from libs.common.waiting import happens
from services.scheduler.domain.cluster import Machine
from services.scheduler.domain.lifecycles import CANCELLED, give_up, place
from services.scheduler.domain.model import Case
from services.scheduler.domain.policy import Demand, Policy
from services.scheduler.domain.shapes import Shape, shape_of
from services.scheduler.store import Inventory, SchedulerStore, SchedulerUnit
from services.scheduler.tables import JOBS

BATCH = 100
LOAD_BATCH = 1000
BACK_OFF_S = 1.0
TOO_LONG = "waited as long as it may, without its turn"
# How far a node's sandboxes reach, as its executor says it, when they reach nobody else's.
LOOPBACK = "loopback"
SILENT_EXECUTOR = "the executor is silent"
NO_EXECUTOR = "no executor has reported its nodes yet"

log = logging.getLogger(__name__)

_placement_seconds = meter().create_histogram(
    "nabla_placement_seconds", unit="s", description="From being queued to having a node"
)


class Ending(NamedTuple):
    """Why a job is not to wait any longer, for people and in one word."""

    reason: str
    cause: str


class Decision(NamedTuple):
    """What one look at the queue came to.

    Args:
        seats: of each job that is placed, the nodes by rank.
        reasons: of each job that came to wait, why.
        endings: of each job that is not to wait any longer, why.
    """

    seats: dict[str, tuple[str, ...]]
    reasons: dict[str, str]
    endings: dict[str, Ending]

    @property
    def jobs(self) -> set[str]:
        return {*self.seats, *self.reasons, *self.endings}


class Placer:
    """Places queued jobs. There is one in a process, and one process on a database.

    Args:
        silent_s: an executor not heard for so long gets no new jobs.
        pass_s: seconds between looks when nothing happens.
    """

    def __init__(self, store: SchedulerStore, *, silent_s: float, pass_s: float, clock: Clock = utc_now) -> None:
        self.policy = store.policy
        self._store = store
        self._silent = timedelta(seconds=silent_s)
        self._pass_s = pass_s
        self._clock = clock
        self._inventories: list[Inventory] = []
        meter().create_observable_gauge("nabla_queued_jobs", [self._queue_depth], description="Jobs that wait")

    async def run(self) -> None:
        await self.rebuild()
        while True:
            try:
                placed = await self.place_waiting()
            except (DBAPIError, StaleRevision) as error:
                log.warning("placing waits for the database", extra={"reason": repr(error)})
                await asyncio.sleep(BACK_OFF_S)
                continue
            if placed < BATCH and not self.policy.has_unexplained:
                await self._wait_for_change()

    async def rebuild(self) -> None:
        """Reads every job that has not ended, in order of id."""
        last_id = ""
        while True:
            async with self._store.view() as view:
                open_jobs = JOBS.c.ended_us.is_(None) & (JOBS.c.id > last_id)
                demands = await view.demands(open_jobs, LOAD_BATCH)
            self._learn_jobs(demands)
            if len(demands) < LOAD_BATCH:
                break
            last_id = max(demands)
        await self._read_inventories()

    async def place_waiting(self) -> int:
        """One decision and its commit, of a bounded number of jobs; returns how many have a node now."""
        await self._catch_up()
        decision = self._decide(to_us(self._clock()))
        if decision.jobs:
            try:
                await self._store.run(lambda unit: _commit(unit, decision))
            except BaseException:
                # What the policy counts as placed is not: it is read again.
                self._store.changes.note(decision.jobs)
                raise
        return len(decision.seats)

    def _decide(self, now_us: int) -> Decision:
        seats = {placement.job_id: placement.node_ids for placement in self.policy.decide(now_us, BATCH)}
        reasons = self.policy.newly_blocked(BATCH)
        return Decision(seats, reasons, endings(self.policy, reasons, self.policy.given_up(now_us, BATCH)))

    async def _catch_up(self) -> None:
        """Takes in what commits have changed since the last look, and which executors have fallen silent."""
        jobs, nodes, projects = self._store.changes.take()
        try:
            if nodes:
                await self._read_inventories()
            for project_id in projects:
                async with self._store.view() as view:
                    jobs.update(await view.queued_in(project_id))
            pending = sorted(jobs)
            for start in range(0, len(pending), LOAD_BATCH):
                ids = pending[start : start + LOAD_BATCH]
                async with self._store.view() as view:
                    self._learn_jobs(dict.fromkeys(ids) | await view.demands(JOBS.c.id.in_(ids)))
        except BaseException:
            self._store.changes.note(jobs, nodes=nodes, projects=projects)
            raise
        self._learn_nodes()

    def _learn_jobs(self, demands: dict[str, Demand | None]) -> None:
        for job_id, demand in demands.items():
            if demand:
                self.policy.apply(demand)
            else:
                self.policy.forget(job_id)

    async def _read_inventories(self) -> None:
        async with self._store.view() as view:
            self._inventories = await view.inventories()

    def _learn_nodes(self) -> None:
        heard_since_us = to_us(self._clock() - self._silent)
        heard = [inventory for inventory in self._inventories if inventory.heard_us >= heard_since_us]
        silent = [inventory for inventory in self._inventories if inventory.heard_us < heard_since_us]
        self.policy.apply_nodes(known_machines(heard, silent), _why_none(self._inventories, heard))

    async def _wait_for_change(self) -> None:
        wait_s = self._pass_s
        if self.policy.next_ready_us is not None:
            wait_s = min(wait_s, max(0.0, (self.policy.next_ready_us - to_us(self._clock())) / 1_000_000))
        await happens(self._store.changes.happened, wait_s)

    def _queue_depth(self, _options: CallbackOptions) -> list[Observation]:
        return [Observation(self.policy.waiting)]


def machines(inventories: list[Inventory]) -> dict[str, Machine]:
    """What is known of, with what takes no new work now."""
    return {
        node.id: Machine(_total(node), _why_closed(node), is_island=node.network == LOOPBACK)
        for inventory in inventories
        for node in inventory.nodes
    }


def _total(node: Node) -> Shape:
    shape = shape_of(node.cpu_count, node.memory_bytes, node.gpu_count, node.gpu_model, node.gpu_memory_bytes)
    return shape._replace(images=bool(node.runtimes))


def known_machines(heard: list[Inventory], silent: list[Inventory]) -> dict[str, Machine]:
    """With those of executors that are away: nobody may say meanwhile that there are no such machines."""
    away = {node: replace(machine, closed=SILENT_EXECUTOR) for node, machine in machines(silent).items()}
    return away | machines(heard)


def _why_closed(node: Node) -> str:
    if node.state != "ready":
        return f"is {node.state}"
    return "is being drained" if node.draining else ""


def nodes_in_contact(inventories: list[Inventory]) -> frozenset[str]:
    """Where what runs can be reached; a node that is being drained is."""
    return frozenset(node.id for inventory in inventories for node in inventory.nodes if node.state == "ready")


def _why_none(inventories: list[Inventory], heard: list[Inventory]) -> str:
    if not inventories:
        return NO_EXECUTOR
    if not heard:
        return SILENT_EXECUTOR
    ready = [node for inventory in heard for node in inventory.nodes if node.state == "ready"]
    if ready and all(node.draining for node in ready):
        return "all nodes are being drained"
    return nodes_detail(heard)


def nodes_detail(inventories: list[Inventory]) -> str:
    """What executors say of why they have no node."""
    return "; ".join(inventory.detail for inventory in inventories if inventory.detail)


def endings(policy: Policy, waiting: Collection[str], given_up: Collection[str]) -> dict[str, Ending]:
    """Which of these jobs are not to wait any longer."""
    hopeless = {job_id: policy.why_hopeless(job_id) for job_id in waiting}
    found = {job_id: Ending(reason, "no_such_machine") for job_id, reason in hopeless.items() if reason}
    for job_id in given_up:
        reason = policy.why_waiting(job_id)
        found[job_id] = Ending(f"waited as long as it may: {reason}" if reason else TOO_LONG, "waited_too_long")
    return found


async def _commit(unit: SchedulerUnit, decision: Decision) -> None:
    cases = await unit.cases(JOBS.c.id.in_(decision.jobs))
    closed = await unit.closed_projects({case.job.project_id for case in cases})
    for case in cases:
        job = case.job
        if job.state != "queued" or job.desired_state == CANCELLED:
            continue
        if job.project_id in closed and job.id in decision.seats:
            # It was closed after the decision: the job is read again, and held.
            unit.touched_jobs.add(job.id)
        elif job.id in decision.seats:
            await _place_one(unit, case, decision.seats[job.id])
        elif job.id in decision.endings:
            await end_waiting(unit, case, decision.endings[job.id])
        else:
            await explain(unit, case, decision.reasons[job.id])


async def end_waiting(unit: SchedulerUnit, case: Case, ending: Ending) -> None:
    await unit.save(case, give_up(case, ending.reason, ending.cause, unit.now_us))


async def _place_one(unit: SchedulerUnit, case: Case, node_ids: tuple[str, ...]) -> None:
    job, origin = case.job, case.attempt.origin if case.attempt else {}
    with span("scheduler place job", job.traceparent, object=job.id, team=job.team_id):
        await unit.save(case, place(job, new_id("attempt"), node_ids, unit.now_us, origin))
    # The wait that the policy could have ended: a retry's delay is not its own.
    since_us = max(job.queued_us or unit.now_us, job.ready_us)
    _placement_seconds.record(max(0, unit.now_us - since_us) / 1_000_000)


async def explain(unit: SchedulerUnit, case: Case, reason: str) -> None:
    """Keeps why a job waits, where everybody can see it."""
    if reason and case.job.detail != reason:
        await unit.save(case, Case(replace(case.job, detail=reason), case.attempt))
