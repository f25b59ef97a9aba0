"""Serving's work with the world outside: looks at each deployment when it is due, does the next step, records it.

Every step may be repeated after a crash at any point: orders carry ids that were recorded before, the proxy's file
is written whole, and a look decides from rows alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from libs.common.clock import Clock, from_us, to_us, utc_now
from libs.common.errors import Unavailable
from libs.common.store import Store
from libs.common.telemetry import meter
from libs.common.waiting import happens
from services.serving.domain.front import Base, Endpoint, NodeDoor, Nodes, Pass, front_config
from services.serving.domain.plan import (
    CheckHealth,
    Clear,
    CollectBento,
    GiveUp,
    OrderReplica,
    Restart,
    Situation,
    Step,
    Wait,
    next_step,
)
from services.serving.ports import Health, Passes, Peers, Proxy
from services.serving.steps import Steps
from services.serving.store import DeploymentRow, OrderedJobRow, RevisionRow, ServingUnit

BATCH = 50
AT_ONCE = 8
# A look that takes longer than this may be repeated beside itself, after a crash for example.
LEASE_S = 120.0
LONG_S = 30.0
HEALTH_EVERY_S = 0.3
RETRY_S = 1.0
BASE_EVERY_S = 0.5

log = logging.getLogger(__name__)
_steps = meter().create_counter("nabla_deployment_steps_total", description="Steps taken, by kind")


class Front:
    """Keeps the proxy's configuration equal to what the database and the platform's addresses say."""

    def __init__(self, store: Store[ServingUnit], proxy: Proxy, base: Callable[[], Base], passes: Passes) -> None:
        self._store = store
        self._proxy = proxy
        self._base = base
        self._passes = passes
        self._shown: Pass | None = None
        self._one_at_a_time = asyncio.Lock()
        self._published: tuple[Base, Nodes] | None = None
        self._moved = True
        self.problem = "Nothing was published yet."

    def note_change(self) -> None:
        """Something was committed: perhaps a node's door is at another address."""
        self._moved = True

    async def publish(self) -> None:
        """Returns when all routes are live.

        Raises:
            Unavailable: the proxy does not show them.
        """
        async with self._one_at_a_time:
            async with self._store.view() as view:
                endpoints = [Endpoint(row.name, row.target) for row in await view.routed()]
                doors = await view.doors()
            base, nodes = self._base(), await self._nodes(doors, ask=True)
            try:
                await self._proxy.publish(front_config(base, endpoints, nodes))
            except Unavailable as error:
                if self.problem != error.detail:
                    log.warning("routes are not live", extra={"reason": error.detail})
                self.problem = error.detail
                raise
            self.problem = ""
            self._published = (base, nodes)

    async def nodes(self) -> Nodes:
        """How nodes are reached now."""
        async with self._store.view() as view:
            return await self._nodes(await view.doors(), ask=self._shown is None)

    async def _nodes(self, doors: Sequence[NodeDoor], *, ask: bool) -> Nodes:
        """A silent executor leaves the pass as it was; it is asked only for the sake of other machines."""
        if ask and any(door.is_far for door in doors):
            try:
                self._shown = await self._passes.front_door()
            except Unavailable as error:
                log.info("there is no pass to other machines yet", extra={"reason": error.detail})
        return Nodes(tuple(doors), self._shown)

    async def run(self, every_s: float) -> None:
        """Publishes at start, when an address of the platform or of a node's door changes, and now and then in case a
        file was lost.
        """
        since_s = 0.0
        while True:
            if since_s >= every_s or self.problem or await self.is_behind():
                with contextlib.suppress(Unavailable):
                    await self.publish()
                since_s = 0.0
            await asyncio.sleep(BASE_EVERY_S)
            since_s += BASE_EVERY_S

    async def is_behind(self) -> bool:
        """Whether something would be published that was not."""
        if self._published is None or self._base() != self._published[0]:
            return True
        published = self._published[1]
        lacks_pass = published.shown is None and any(door.is_far for door in published.doors)
        if not (self._moved or lacks_pass):
            return False
        self._moved = False
        return await self.nodes() != published


class Reconciler:
    """Brings every deployment nearer to what its user wants."""

    def __init__(
        self,
        store: Store[ServingUnit],
        steps: Steps,
        front: Front,
        peers: Peers,
        health: Health,
        *,
        ask_every_s: float,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._steps = steps
        self._front = front
        self._peers = peers
        self._health = health
        self._ask_every_s = ask_every_s
        self._clock = clock
        self._slots = asyncio.Semaphore(AT_ONCE)
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """Looks whenever something is due, beginning with what a killed process was just looking at."""
        await self._store.run(lambda unit: unit.forget_leases())
        while True:
            self.wake.clear()
            pause_s = await self.run_pass()
            await happens(self.wake, pause_s)

    async def run_pass(self) -> float:
        """Looks at up to BATCH deployments that are due, and answers in how many seconds the next one is."""
        async with self._store.view() as view:
            due = await view.due(self._clock(), BATCH)
        await asyncio.gather(*(self._visit(deployment_id) for deployment_id in due))
        async with self._store.view() as view:
            next_us = await view.next_due_us()
        left_s = (next_us - to_us(self._clock())) / 1e6 if next_us is not None else LONG_S
        return min(LONG_S, max(0.01, left_s))

    async def _visit(self, deployment_id: str) -> None:
        """One look, leased: an event that comes during it makes the deployment due again, and is not forgotten."""
        async with self._slots:
            lease_us = to_us(self._clock() + timedelta(seconds=LEASE_S, microseconds=random.randrange(1_000_000)))
            await self._store.run(lambda unit: unit.set_due(deployment_id, lease_us))
            try:
                pause_s = await self._look(deployment_id)
            except Unavailable as error:
                log.info("a step waits", extra={"deployment": deployment_id, "reason": error.detail})
                pause_s = RETRY_S
            except Exception:
                # One deployment that cannot be handled must not stop the others.
                log.exception("a step failed", extra={"deployment": deployment_id})
                pause_s = LONG_S
            due_us = to_us(self._clock() + timedelta(seconds=pause_s))
            await self._store.run(lambda unit: unit.set_due(deployment_id, due_us, unless_changed_from=lease_us))

    async def _look(self, deployment_id: str) -> float:
        async with self._store.view() as view:
            deployment = await view.deployment(deployment_id)
            if deployment is None:
                return LONG_S
            revision = await view.revision_of(deployment)
            live = await view.live_jobs(deployment_id)
            job = await view.job(current_job(deployment, revision))
        for each in live:
            await self._follow(deployment, each, wanted=bool(job and each.id == job.id))
        now = self._clock()
        step = next_step(situation(deployment, job, [each.id for each in live], now))
        _steps.add(1, {"step": type(step).__name__})
        return await self._take(step, deployment, now)

    async def _follow(self, deployment: DeploymentRow, job: OrderedJobRow, *, wanted: bool) -> None:
        """Asks about a job that has been silent, and repeats the order or the halt that did not take.

        A scheduler that does not answer keeps nothing else from being done: it is asked again later.
        """
        wanted = wanted and deployment.state not in ("deleting", "failed")
        rarely = 6 if deployment.state == "ready" else 3 if job.state == "ordered" else 1
        every_s = self._ask_every_s * rarely
        silent = (to_us(self._clock()) - job.asked_us) / 1e6 >= every_s
        if silent:
            try:
                told = await self._peers.job(job.id, deployment.team_id)
            except Unavailable as error:
                log.info("a job's owner is silent", extra={"job": job.id, "reason": error.detail})
                await self._steps.asked_in_vain(job.id)
            else:
                await self._steps.asked(deployment, job, told, wanted=wanted)
        elif not wanted and not job.halted:
            await self._steps.halt(deployment, job.id)

    async def _take(self, step: Step, deployment: DeploymentRow, now: datetime) -> float:
        """Does one step and answers in how many seconds to look again; 0 is at once."""
        pause_s = 0.0
        match step:
            case CollectBento(job):
                fileset_id = await self._peers.bento_of(job.id, deployment.team_id)
                pause_s = await self._steps.collect(deployment, job, fileset_id, now)
            case OrderReplica():
                await self._steps.order_replica(deployment)
            case CheckHealth(job):
                pause_s = await self._check(deployment, job.address)
            case Restart():
                await self._steps.restart(deployment, step, now)
                await self._front.publish()
                pause_s = step.pause_s
            case GiveUp():
                pause_s = await self._give_up(deployment, step, now)
            case Clear():
                await self._front.publish()
                pause_s = await self._steps.clear(deployment)
            case Wait(detail):
                await self._steps.say(deployment, detail)
                pause_s = LONG_S if deployment.state in ("ready", "failed") else self._wait_s(deployment)
        return pause_s

    def _wait_s(self, deployment: DeploymentRow) -> float:
        """Until the next question to the scheduler, or the pause before a replica is over."""
        left_s = (deployment.restart_us - to_us(self._clock())) / 1e6
        return min(self._ask_every_s, left_s) if left_s > 0 else self._ask_every_s

    async def _check(self, deployment: DeploymentRow, address: str) -> float:
        nodes = await self._front.nodes()
        if not await self._health.ready(nodes.backend_of(address), nodes.shown):
            await self._steps.say(deployment, "The replica loads the model.")
            return HEALTH_EVERY_S
        if await self._steps.aim(deployment, address):
            await self._front.publish()
            await self._steps.ready(deployment, address)
        return 0.0

    async def _give_up(self, deployment: DeploymentRow, step: GiveUp, now: datetime) -> float:
        lines: list[str] = []
        if step.log_of:
            async with self._store.view() as view:
                job = await view.job(step.log_of)
            ended_at = from_us(job.ended_us) if job and job.ended_us else now
            lines, whole = await self._lines(step.log_of, deployment.team_id)
            if not whole and job and job.ended_us and now - ended_at < timedelta(seconds=5):
                return 0.3
        await self._steps.fail(deployment, step.reason, lines)
        if deployment.target:
            # Its address may soon be another replica's.
            await self._front.publish()
        return 0.0

    async def _lines(self, job_id: str, team_id: str) -> tuple[list[str], bool]:
        """A log that cannot be read just now must not keep a failure from being told."""
        try:
            return await self._peers.last_lines(job_id, team_id, 20)
        except Unavailable:
            return [], False


def current_job(deployment: DeploymentRow, revision: RevisionRow) -> str:
    return revision.build_job_id if deployment.state == "building" else revision.replica_job_id


def situation(deployment: DeploymentRow, job: OrderedJobRow | None, live_jobs: list[str], now: datetime) -> Situation:
    return Situation(
        state=deployment.state,
        job=job.facts() if job else None,
        target=deployment.target,
        ready_at=from_us(deployment.ready_us) if deployment.ready_us else None,
        served_before=deployment.served,
        deaths=deployment.deaths,
        restart_at=from_us(deployment.restart_us),
        live_jobs=tuple(live_jobs),
        now=now,
    )
