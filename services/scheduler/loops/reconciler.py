"""The reconciling loop: converges with what is true when events and commands are late, lost, or switched off.

Each pass looks at a bounded number of rows, those first that were looked at longest ago.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

from sqlalchemy import Row
from sqlalchemy.exc import DBAPIError

from libs.common.clock import Clock, to_us, utc_now
from libs.common.contracts.messages import Execution
from libs.common.errors import IllegalTransition, Refusal, StaleRevision, Unavailable
from libs.common.telemetry import span
from services.scheduler.domain.lifecycles import LIVE, forget, lose_contact, missing_commands, regain_contact
from services.scheduler.domain.model import Case
from services.scheduler.domain.policy import Policy
from services.scheduler.handlers import apply_execution
from services.scheduler.loops.placer import end_waiting, endings, explain, nodes_detail, nodes_in_contact
from services.scheduler.ports import Executor, Registry
from services.scheduler.store import GONE, Inventory, Place, SchedulerStore, SchedulerUnit
from services.scheduler.tables import ATTEMPTS, JOBS

ROWS = 100
# Of which the executor tells in one answer; each is about a kilobyte.
RANKS = 500
# Jobs of each live state whose contact is looked at: few bytes each.
PLACES = 1000
# Each is a question of its own.
PROJECTS = 20
EXECUTOR = "executor"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds.

    Args:
        pass_s: between passes.
        silent_s: without a word of an executor, until its jobs are unreachable.
        attempt_s: without news of an attempt, until the executor is asked about it.
        project_s: without news of a project, until the registry is asked about it.
    """

    pass_s: float
    silent_s: float
    attempt_s: float
    project_s: float


class Reconciler:
    """Asks instead of waiting to be told."""

    def __init__(
        self,
        store: SchedulerStore,
        executor: Executor,
        registry: Registry,
        policy: Policy,
        patience: Patience,
        *,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._executor = executor
        self._registry = registry
        self._policy = policy
        self._patience = patience
        self._clock = clock
        self._started_us = to_us(clock())

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._patience.pass_s)
            try:
                await self.reconcile()
            except (DBAPIError, StaleRevision) as error:
                log.warning("reconciling waits for the database", extra={"reason": repr(error)})

    async def reconcile(self) -> None:
        """One pass. Who does not answer is asked again in the next."""
        await self._ask_for_nodes()
        await self._store.run(self._review_contact)
        await self._ask_for_attempts()
        await self._store.run(self._review_reasons)
        await self._ask_for_projects()

    async def _ask_for_nodes(self) -> None:
        async with self._store.view() as view:
            inventories = await view.inventories()
        recently_us = to_us(self._clock() - timedelta(seconds=self._patience.silent_s / 2))
        if any(inventory.heard_us >= recently_us for inventory in inventories):
            return
        try:
            page = await self._executor.nodes()
        except Refusal as refusal:
            log.info("the executor does not tell its nodes", extra={"reason": refusal.detail})
            return
        await self._store.run(lambda unit: unit.keep_inventory(EXECUTOR, page.items, page.detail))

    async def _review_contact(self, unit: SchedulerUnit) -> None:
        """Shows which jobs cannot be reached, and which can again."""
        inventories = await unit.inventories()
        heard = [inventory for inventory in inventories if self._is_heard(inventory, unit.now_us)]
        nodes = nodes_in_contact(heard)
        detail = _why_unreachable(heard)
        looked_at = [place for state in LIVE for place in await unit.places(state, PLACES)]
        wrong = [place for place in looked_at if _is_wrong(place, nodes, detail)]
        ids = [place.job_id for place in wrong[:ROWS]]
        for case in await unit.cases(JOBS.c.id.in_(ids), JOBS.c.state.in_(LIVE)):
            reachable = case.attempt is not None and nodes.issuperset(case.attempt.node_ids)
            await unit.save(case, regain_contact(case) if reachable else lose_contact(case, detail))
        # The rest of what is wrong stays at the front.
        waiting = {place.job_id for place in wrong[ROWS:]}
        await unit.mark_checked(JOBS, [place.job_id for place in looked_at if place.job_id not in waiting])

    def _is_heard(self, inventory: Inventory, now_us: int) -> bool:
        """Our own absence is no executor's silence."""
        return max(inventory.heard_us, self._started_us) >= now_us - self._patience.silent_s * 1_000_000

    async def _ask_for_attempts(self) -> None:
        before_us = to_us(self._clock() - timedelta(seconds=self._patience.attempt_s))
        async with self._store.view() as view:
            due = await view.cases(
                ATTEMPTS.c.ended_us.is_(None),
                ATTEMPTS.c.checked_us < before_us,
                order=ATTEMPTS.c.checked_us,
                limit=ROWS,
            )
        told = {case.attempt.id: case.attempt.execution_revision >= 0 for case in due if case.attempt}
        for team_id, ids in _attempts_by_team(due):
            try:
                known = await self._executor.executions(team_id, ids)
            except Refusal as refusal:
                log.info("the executor does not tell its executions", extra={"reason": refusal.detail})
                # The next pass begins with others.
                await self._store.run(partial(_mark_attempts, attempt_ids=ids))
                if isinstance(refusal, Unavailable):
                    return
                continue
            named = {item.attempt_id for item in known}
            forgotten = {each for each in ids if each not in named and told[each]}
            await self._store.run(partial(_converge, attempt_ids=ids, known=known, forgotten=forgotten))

    async def _review_reasons(self, unit: SchedulerUnit) -> None:
        """Renews why jobs wait, as that changes without anything happening to them."""
        waiting = JOBS.c.ended_us.is_(None) & (JOBS.c.state == "queued")
        cases = await unit.cases(waiting, order=JOBS.c.checked_us, limit=ROWS)
        hopeless = endings(self._policy, [case.job.id for case in cases], ())
        for case in cases:
            if case.job.id in hopeless:
                await end_waiting(unit, case, hopeless[case.job.id])
            else:
                await explain(unit, case, self._policy.why_waiting(case.job.id))
        await unit.mark_checked(JOBS, [case.job.id for case in cases])

    async def _ask_for_projects(self) -> None:
        """Learns which projects take no more jobs, and which do again."""
        before_us = to_us(self._clock() - timedelta(seconds=self._patience.project_s))
        async with self._store.view() as view:
            due = await view.projects_unchecked(before_us, PROJECTS)
        for row in due:
            state, revision = row.state, row.revision
            try:
                found = await self._registry.project(row.team_id, row.id)
            except Refusal as refusal:
                log.info("the registry does not tell a project", extra={"reason": refusal.detail})
                is_silent = isinstance(refusal, Unavailable)
            else:
                is_silent = False
                state, revision = (found.state, found.revision) if found else (GONE, row.revision)
            # Also without an answer: the next pass begins with others.
            await self._store.run(partial(_correct, row=row, state=state, revision=revision))
            if is_silent:
                return


async def _correct(unit: SchedulerUnit, row: Row[Any], state: str, revision: int) -> None:
    await unit.correct_project(row, state, revision)


async def _mark_attempts(unit: SchedulerUnit, attempt_ids: list[str]) -> None:
    await unit.mark_checked(ATTEMPTS, attempt_ids)


def _why_unreachable(heard: list[Inventory]) -> str:
    """Of a job whose node is not ready, with what its cluster says of itself."""
    if not heard:
        return "the executor is silent"
    return ": ".join(["its node is out of contact", *filter(None, [nodes_detail(heard)])])


def _is_wrong(place: Place, ready: frozenset[str], detail: str) -> bool:
    """Whether the job's state, or its reason, is not what its node's contact says."""
    if ready.issuperset(place.node_ids):
        return place.state == "unreachable" and not place.forgotten
    return place.state != "unreachable" or (place.detail != detail and not place.forgotten)


async def _converge(
    unit: SchedulerUnit, attempt_ids: list[str], known: Collection[Execution], forgotten: Collection[str]
) -> None:
    """Applies what the executor knows of these attempts, and sends again what it should know.

    Args:
        forgotten: those of which it had told before it was asked, and does not know now.
    """
    for execution in known:
        try:
            await apply_execution(unit, execution)
        except IllegalTransition as error:
            log.error(
                "the executor tells what cannot be", extra={"attempt": execution.attempt_id, "reason": str(error)}
            )
    named = {execution.attempt_id for execution in known}
    for case in await unit.cases(ATTEMPTS.c.id.in_(attempt_ids)):
        assert case.attempt
        if case.attempt.id in forgotten:
            await unit.save(case, forget(case))
        commands = missing_commands(case, known=case.attempt.id in named)
        with span("scheduler repeat commands", case.job.traceparent, object=case.job.id):
            await unit.send(replace(case, commands=commands))
    await unit.mark_checked(ATTEMPTS, attempt_ids)


def _attempts_by_team(cases: list[Case]) -> list[tuple[str, list[str]]]:
    """What to ask in one question each: attempts of one team, and no more ranks than an answer holds."""
    questions: list[tuple[str, list[str]]] = []
    room: dict[str, int] = defaultdict(int)
    asked: dict[str, list[str]] = {}
    for case in cases:
        if case.attempt is None:
            continue
        team_id, ranks = case.job.team_id, len(case.attempt.members)
        if room[team_id] < ranks:
            room[team_id], asked[team_id] = RANKS, []
            questions.append((team_id, asked[team_id]))
        asked[team_id].append(case.attempt.id)
        room[team_id] -= ranks
    return questions
