"""What the registry does on its own: purging what is over, and asking after runs whose jobs have gone silent."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from libs.common.clock import to_us
from libs.common.contracts.messages import Job, ProjectPurged
from libs.common.errors import Refusal, StaleRevision
from libs.common.store import Store
from services.registry.domain.secrets import binding
from services.registry.handlers.runs import apply_job
from services.registry.ports import BrokenSeal, Jobs, Vault
from services.registry.settings import RegistrySettings
from services.registry.store import RegistryUnit
from services.registry.store.runs import RunsUnit, Tracked
from services.registry.store.secrets import Kept

PROJECTS_A_PASS = 20
RUNS_A_PASS = 50
SECRETS_A_PASS = 200
# A run whose job said nothing for so long is asked after.
SILENT = timedelta(seconds=60)
# Tokens and codes that are over stay visible for so long.
OVER_KEPT = timedelta(days=90)

log = logging.getLogger(__name__)


class Upkeep:
    """Forgets what is over: deleted projects, spent codes and old tokens, old audit rows."""

    def __init__(self, store: Store[RegistryUnit], runs: Store[RunsUnit], settings: RegistrySettings) -> None:
        self._store = store
        self._runs = runs
        self._settings = settings

    async def run(self) -> None:
        while True:
            await self.forget()
            await asyncio.sleep(self._settings.upkeep_s)

    async def forget(self) -> None:
        """One pass over a bounded number of projects."""
        purged = await self._store.run(self._purge)
        if purged:
            log.info("purged deleted projects", extra={"projects": purged})
        await self._store.run(self._forget_accounts)
        await self._runs.run(self._forget_audit)

    async def _purge(self, unit: RegistryUnit) -> int:
        before = unit.now - timedelta(days=self._settings.deleted_project_days)
        projects = await unit.projects.deleted_before(before, PROJECTS_A_PASS)
        for project in projects:
            await unit.models.remove_of(project.id)
            await unit.secrets.remove_of(project.id)
            await unit.projects.remove(project.id)
            await unit.emit(
                ProjectPurged(project=project),
                team_id=project.team_id,
                object_id=project.id,
                project_id=project.id,
                revision=project.revision + 1,
            )
        return len(projects)

    async def _forget_accounts(self, unit: RegistryUnit) -> None:
        await unit.accounts.forget_over(unit.now - OVER_KEPT)
        await self._forget_audit(unit)

    async def _forget_audit(self, unit: RegistryUnit | RunsUnit) -> None:
        before = unit.now - timedelta(days=self._settings.audit_days)
        await unit.forget_audit(to_us(before))


class RunCheck:
    """Brings runs to where their jobs are when the events did not: a bounded number a pass, longest unseen first."""

    def __init__(self, store: Store[RunsUnit], jobs: Jobs, pause_s: float) -> None:
        self._store = store
        self._jobs = jobs
        self._pause_s = pause_s

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s)
            try:
                await self.check()
            except Refusal as refusal:
                log.warning("runs could not be checked", extra={"reason": str(refusal)})

    async def check(self) -> None:
        """One pass. The jobs are asked for outside of any transaction."""
        async with self._store.view() as view:
            silent = await view.runs.unchecked(view.now - SILENT, RUNS_A_PASS)
        if not silent:
            return
        jobs = [await self._jobs.get(run.id, run.team_id) for run in silent]
        await self._store.run(lambda unit: _apply(unit, silent, [job for job in jobs if job]))


class KeyTurn:
    """Brings every secret under the installation's newest key. Values stay as they are: only their keys are wrapped.

    Old keys stay in their file, for backups from their time; whoever turned the key because it was seen removes them.
    """

    def __init__(self, store: Store[RegistryUnit], vault: Vault, pause_s: float) -> None:
        self._store = store
        self._vault = vault
        self._pause_s = pause_s
        # Those that do not open with the key that they name: told once, and looked at again after the next start.
        self._broken: set[str] = set()

    async def run(self) -> None:
        while True:
            while await self.turn():
                pass
            await asyncio.sleep(self._pause_s)

    async def turn(self) -> int:
        """One pass: how many were wrapped anew."""
        *older, newest = self._vault.keys()
        async with self._store.view() as view:
            lost = await view.secrets.lost([*older, newest])
            behind = await view.secrets.wrapped_otherwise(newest, older, SECRETS_A_PASS + len(self._broken))
        if lost:
            log.error("secrets are sealed with a key that is not here", extra={"secrets": lost})
        wrapped = [one for one in behind if one.secret.id not in self._broken and await self._wrap(one)]
        if wrapped:
            log.info("secrets are under the newest key now", extra={"secrets": len(wrapped), "key": newest})
        return len(wrapped)

    async def _wrap(self, kept: Kept) -> bool:
        try:
            sealed = self._vault.rewrap(kept.sealed, binding(kept.secret))
        except BrokenSeal as error:
            self._broken.add(kept.secret.id)
            log.error("a secret cannot be opened", extra={"secret": kept.secret.id, "reason": str(error)})
            return False
        try:
            await self._store.run(lambda unit: unit.secrets.save(kept.secret, sealed, kept.revision))
        except StaleRevision:
            return False  # it has just got another value, under the newest key, or is gone
        return True


async def _apply(unit: RunsUnit, silent: list[Tracked], jobs: list[Job]) -> None:
    for job in jobs:
        await apply_job(job, unit)
    await unit.runs.checked([run.id for run in silent], unit.now)
