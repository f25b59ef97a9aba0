"""Keeps the bucket there and sweeps file sets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from functools import partial

from libs.common.clock import Clock, to_us, utc_now
from libs.common.faults import crash_point
from libs.common.store import Store
from libs.common.telemetry import meter
from services.storage.domain.filesets import FILESET
from services.storage.loops.passes import ROWS_A_PASS, apart, calmly, in_turn
from services.storage.ports import ObjectStore
from services.storage.settings import StorageSettings
from services.storage.store import FilesetRow, StorageUnit

SWEEP_S = 60.0

_swept = meter().create_counter("nabla_filesets_swept_total", description="Forgotten file sets removed")


class BucketKeeper:
    """Makes the bucket as soon as the object store answers, and knows when it does not."""

    def __init__(self, objects: ObjectStore, settings: StorageSettings, appeared: Callable[[], None]) -> None:
        self._objects = objects
        self._settings = settings
        self._appeared = appeared

    async def run(self) -> None:
        while True:
            before = self._objects.problem
            await self._objects.prepare()
            if before and not self._objects.problem:
                self._appeared()
            await asyncio.sleep(self._settings.reconcile_s if not self._objects.problem else 1.0)


class Sweeper:
    """Removes what nobody can need: forgotten open sets, and versions that came after a set was sealed."""

    def __init__(
        self,
        store: Store[StorageUnit],
        objects: ObjectStore,
        settings: StorageSettings,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._objects = objects
        self._settings = settings
        self._clock = clock
        self._reached_deleted = self._reached_untidy = ""

    async def run(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            if not self._objects.problem:
                await self.sweep()

    async def sweep(self) -> None:
        """One pass over a bounded number of file sets."""
        await calmly("expire file sets", self._expire_forgotten)
        await calmly("remove file sets", self._remove_deleted)
        await calmly("tidy file sets", self._tidy_sealed)
        await calmly("give up uploads", self._give_up_uploads)

    async def _expire_forgotten(self) -> None:
        await self._store.run(self._expire)

    async def _remove_deleted(self) -> None:
        async with self._store.view() as view:
            rows = await view.filesets.deleted(self._reached_deleted, ROWS_A_PASS)
        self._reached_deleted = ""
        for row, self._reached_deleted in in_turn(rows, ROWS_A_PASS):
            await apart("remove a file set", row.id, partial(self._remove, row))

    async def _tidy_sealed(self) -> None:
        # Until then a URL that was given before the seal still takes a PUT.
        before_us = to_us(self._clock()) - 2 * self._settings.url_lifetime_s * 1_000_000
        async with self._store.view() as view:
            rows = await view.filesets.untidy(before_us, self._reached_untidy, ROWS_A_PASS)
        self._reached_untidy = ""
        for row, self._reached_untidy in in_turn(rows, ROWS_A_PASS):
            await apart("tidy a file set", row.id, partial(self._tidy, row))

    async def _give_up_uploads(self) -> None:
        await self._objects.abort_multiparts(self._clock() - timedelta(days=1))

    async def _expire(self, unit: StorageUnit) -> None:
        before = to_us(unit.now) - round(self._settings.open_lifetime_s * 1e6)
        for row in await unit.filesets.forgotten(before, ROWS_A_PASS):
            state = FILESET.next_state(row.id, row.state, "expire")
            await unit.swap(FilesetRow, row.id, row.revision, {"state": state})

    async def _remove(self, row: FilesetRow) -> None:
        await self._objects.remove(await self._objects.versions(f"{row.kind}/{row.id}/"))
        crash_point("storage.after_objects_removed")
        await self._store.run(lambda unit: unit.filesets.drop(row.id))
        _swept.add(1)

    async def _tidy(self, row: FilesetRow) -> None:
        stored = await self._objects.versions(f"{row.kind}/{row.id}/")
        async with self._store.view() as view:
            kept = {file.version for file in await view.filesets.files(row.id)}
        await self._objects.remove([item for item in stored if item.version not in kept])
        await self._store.run(lambda unit: unit.swap(FilesetRow, row.id, row.revision, {"tidy": True}))
