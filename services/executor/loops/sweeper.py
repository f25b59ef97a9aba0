"""Makes what the cluster holds equal to what executions need, whatever was lost in between, and asks for lost news."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial

from sqlalchemy.exc import DBAPIError

from libs.common.clock import to_us, utc_now
from libs.common.errors import Refusal, StaleRevision, Unavailable
from services.executor.domain.execution import ENDED, FINISHING, RUNNING, STARTING
from services.executor.loops.driver import reservation_of
from services.executor.loops.endings import ExecutorStore, load
from services.executor.ports import Cluster, ClusterAway, Logs, NodeAway, NoRoom
from services.executor.settings import ExecutorSettings
from services.executor.store import PAGE, ExecutionRow, ExecutorUnit

SWEEP_S = 30.0
KEPT = timedelta(days=365)

log = logging.getLogger(__name__)


class Sweeper:
    """Releases what ended executions still hold, and reserves again for running ones that a new head forgot.

    Args:
        on_change: called when an execution became due.
    """

    def __init__(
        self,
        store: ExecutorStore,
        cluster: Cluster,
        logs: Logs,
        settings: ExecutorSettings,
        on_change: Callable[[], None],
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._logs = logs
        self._settings = settings
        self._on_change = on_change

    async def run(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            with contextlib.suppress(ClusterAway, TimeoutError):
                await self.sweep()
            try:
                await self.ask_for_seals()
                await self.forget_old()
            except (DBAPIError, StaleRevision) as error:
                log.warning("sweeping waits for the database", extra={"reason": repr(error)})

    async def ask_for_seals(self) -> None:
        """One pass over ended executions whose log should have been sealed, but nobody told."""
        before_us = to_us(utc_now()) - int(self._settings.revisit_s * 1_000_000)
        async with self._store.view() as view:
            due = await view.unsealed(before_us)
        for row in due:
            sealed, is_silent = False, False
            try:
                sealed = await self._logs.is_sealed(row.team_id, row.job_id)
            except Refusal as refusal:
                log.info("storage does not tell whether a log is sealed", extra={"reason": refusal.detail})
                is_silent = isinstance(refusal, Unavailable)
            # Also without an answer: the next pass begins with others.
            await self._store.run(partial(_note_asked, attempt_id=row.id, sealed=sealed))
            if is_silent:
                return
        if due:
            self._on_change()

    async def forget_old(self) -> None:
        """One pass over executions that nobody asks for any more: the scheduler keeps their history."""
        before_us = to_us(utc_now() - KEPT)
        if count := await self._store.run(lambda unit: unit.forget_ended(before_us)):
            log.info("forgot old executions", extra={"count": count})

    async def sweep(self) -> None:
        """One pass. Reservations with names unknown here belong to others."""
        reserved = await self._cluster.reserved()
        async with self._store.view() as view:
            holders = await view.of_attempts(reserved)
            started = {each for _, each, _, state in await view.unfinished() if state in (STARTING, RUNNING, FINISHING)}
            forgotten = await view.of_attempts(sorted(started - reserved)[:PAGE])
        for attempt_id, rows in _by_attempt(holders).items():
            if all(row.state == ENDED for row in rows):
                await self._cluster.release(attempt_id)
        for rows in _by_attempt(forgotten).values():
            await self._reserve_again(rows)

    async def _reserve_again(self, rows: Sequence[ExecutionRow]) -> None:
        attempt_id = rows[0].attempt_id
        try:
            gpus = await self._cluster.reserve(reservation_of(rows[0]))
        except (NodeAway, NoRoom) as error:
            log.warning("a running attempt has no reservation", extra={"attempt_id": attempt_id, "reason": str(error)})
            return
        if [list(indices) for indices in gpus] != [row.gpu_indices for row in rows]:
            log.warning("Ray counts other GPUs than the attempt uses", extra={"attempt_id": attempt_id})


def _by_attempt(rows: Iterable[ExecutionRow]) -> dict[str, list[ExecutionRow]]:
    found: dict[str, list[ExecutionRow]] = {}
    for row in rows:
        found.setdefault(row.attempt_id, []).append(row)
    return found


async def _note_asked(unit: ExecutorUnit, attempt_id: str, sealed: bool) -> None:
    row = await load(unit, attempt_id)
    asked_us = to_us(unit.now)
    if sealed and not row.log_sealed:
        await unit.change(row, asked_us=asked_us, log_sealed=True, visit_us=0)
    else:
        await unit.change(row, asked_us=asked_us)
