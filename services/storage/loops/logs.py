"""Closes gaps in logs, moves lines into the object store, seals logs, and sees that they stay."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from libs.common.clock import Clock, to_us, utc_now
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import Job, JobSucceeded, LogFrame, LogSealed
from libs.common.errors import Unavailable
from libs.common.faults import crash_point
from libs.common.ids import new_id
from libs.common.inbox import Inbox
from libs.common.loglines import Slice
from libs.common.routing import INTERNAL, Route
from libs.common.store import Store
from libs.common.telemetry import meter
from libs.common.waiting import happens
from services.storage.domain.logs import (
    ENDED,
    LOG,
    OVER,
    Block,
    lost_lines,
    packed_blocks,
    unpacked_chunk,
)
from services.storage.log_handlers import LogHandlers
from services.storage.loops.passes import ROWS_A_PASS, apart, calmly, in_turn
from services.storage.ports import BlockStore, Frames, Jobs, ObjectStore
from services.storage.settings import StorageSettings
from services.storage.store import ChunkRow, LogRow, Part, StorageUnit

CHUNKS_A_PART = 500
PART_BYTES = 8 << 20
CHUNKS_A_PASS = 1000
SCRUBBED_S = 3600
# A running job's log moves to the object store in parts of its own once this much waits in the database.
LIVE_BYTES = 32 << 20
CHECK_S = 60.0
MID_TURN_S = 1.0

log = logging.getLogger(__name__)

_live_chunks = meter().create_gauge("nabla_log_live_chunks", description="Log chunks not yet in the object store")
_lost_parts = meter().create_counter("nabla_log_lost_parts_total", description="Parts of logs lost by the object store")


class LogKeeper:
    """Closes gaps that stayed open, moves lines into the object store and seals logs that are whole."""

    def __init__(
        self,
        store: Store[StorageUnit],
        inbox: Inbox[StorageUnit],
        handlers: LogHandlers,
        blocks: BlockStore,
        frames: Frames,
        *,
        settings: StorageSettings,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._inbox = inbox
        self._handlers = handlers
        self._blocks = blocks
        self._frames = frames
        self._settings = settings
        self._clock = clock
        self._wake = asyncio.Event()
        self._reached = self._reached_gaps = ""
        self._gap_route = Route(LogFrame, handlers.close_gaps, INTERNAL)

    def committed(self) -> None:
        """Called after each commit."""
        if self._handlers.may_be_whole:
            self._handlers.may_be_whole = False
            self.wake()

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        while True:
            self._wake.clear()
            await calmly("keep logs", self.keep_logs)
            pause_s = self._settings.reconcile_s
            await happens(self._wake, min(MID_TURN_S, pause_s) if self._reached else pause_s)

    async def keep_logs(self) -> None:
        """One pass over a bounded number of logs."""
        await self._close_gaps()
        async with self._store.view() as view:
            rows = await view.logs.to_keep(self._reached, LIVE_BYTES, ROWS_A_PASS)
            _live_chunks.set(await view.logs.live_chunks())
            awaited = {row.id for row in rows if row.state == ENDED and not await self._handlers.is_whole(view, row)}
        if awaited:
            await calmly("look after frames", self._look_after_frames)
        self._reached = ""
        for row, self._reached in in_turn(rows, ROWS_A_PASS):
            if row.id not in awaited:
                await apart("keep a log", row.id, partial(self._keep, row))

    async def _look_after_frames(self) -> None:
        """Learns how far what the bus held is settled: by that, logs without a last frame are given up on."""
        now = self._clock()
        newest, settled = await self._frames.newest_and_settled()
        self._handlers.intake.note(now, newest, settled)

    async def _keep(self, row: LogRow) -> None:
        """Moves the log's lines into the object store, and seals it when it is whole."""
        while await self._compact_part(row.id):
            pass
        if row.state == ENDED:
            await self._store.run(lambda unit: self._seal(unit, row.id))

    async def _close_gaps(self) -> None:
        patience_us = round(self._settings.gap_patience_s * 1e6)
        async with self._store.view() as view:
            before_us = to_us(self._clock()) - patience_us
            rows = await view.logs.with_gap_since(before_us, self._reached_gaps, ROWS_A_PASS)
        self._reached_gaps = ""
        for row, self._reached_gaps in in_turn(rows, ROWS_A_PASS):
            await apart("close a gap", row.id, partial(self._close_gap, row))

    async def _close_gap(self, row: LogRow) -> None:
        envelope = Envelope(
            id=new_id("event"),
            type=LogFrame.ROUTE.type,
            source="storage",
            time=self._clock(),
            object_id=row.id,
            team_id=row.team_id,
        )
        await self._inbox.apply(self._gap_route, LogFrame(job_id=row.id), envelope)

    async def _compact_part(self, job_id: str) -> bool:
        """Moves the oldest chunks, up to a part; whether there were any."""
        async with self._store.view() as view:
            chunks = await view.logs.waiting_chunks(job_id, CHUNKS_A_PART)
        if not chunks:
            return False
        body, blocks = await asyncio.to_thread(_part_of, chunks)
        key = f"log/{job_id}/{blocks[0].first_sequence:012d}"
        await self._blocks.write(key, body)
        crash_point("storage.after_block_write")
        await self._store.run(lambda unit: _record(unit, job_id, key, blocks))
        return True

    async def _seal(self, unit: StorageUnit, job_id: str) -> None:
        row = await unit.logs.get(job_id)
        if row is None or await unit.logs.waiting_chunks(job_id, 1) or await unit.logs.held(job_id):
            return
        state = LOG.next_state(row.id, row.state, "seal")
        if state == row.state:
            return
        await unit.swap(LogRow, row.id, row.revision, {"state": state})
        await unit.logs.forget_sources(row.id)
        sealed = LogSealed(job_id=row.id, line_count=row.last_sequence, size_bytes=row.size_bytes)
        await unit.emit(
            sealed,
            team_id=row.team_id,
            project_id=row.project_id,
            object_id=row.id,
            revision=row.revision + 1,
        )


class LogScrub:
    """Looks at each start whether the object store still has what it acknowledged lately, and mends it.

    The store writes to disk some time after it has acknowledged. So lines stay in the database for a while longer, and
    none of them goes before this has looked: a power cut is followed by a start.
    """

    def __init__(
        self,
        store: Store[StorageUnit],
        blocks: BlockStore,
        objects: ObjectStore,
        settings: StorageSettings,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._objects = objects
        self._blocks = blocks
        self._settings = settings
        self._clock = clock
        self._since_us: int | None = None
        self._reached = ""
        self.done = False

    async def run(self) -> None:
        while True:
            if not self._objects.problem:
                await calmly("look whether logs are stored", self.scrub)
            await self.forget_chunks()
            await asyncio.sleep(self._settings.reconcile_s)

    async def scrub(self) -> None:
        """One pass over a bounded number of objects, until all of the last hour have been seen."""
        if self.done:
            return
        async with self._store.view() as view:
            if self._since_us is None:
                # Of the hour before the last block, however long we have been away since.
                self._since_us = (await view.logs.newest_block_us() or 0) - SCRUBBED_S * 1_000_000
            parts = await view.logs.parts(self._reached, self._since_us, ROWS_A_PASS)
        for part in parts:
            await apart("look whether a log is stored", part.key, partial(self._look_at, part))
            self._reached = part.key
        self.done = len(parts) < ROWS_A_PASS

    async def _look_at(self, part: Part) -> None:
        async with self._store.view() as view:
            chunks = await view.logs.chunks_of(part)
        try:
            found = await self._blocks.find(part.key)
        except Unavailable as error:
            if not chunks:
                # Nothing that we could do, now or later; whoever reads these lines is told the same.
                log.error("part of a log cannot be read", extra={"key": part.key, "reason": str(error)})
                return
            found = None
        if found is None or len(found) != part.size_bytes:
            await self._mend(part, [unpacked_chunk(chunk.body) for chunk in chunks])

    async def _mend(self, part: Part, chunks: list[Slice]) -> None:
        """Writes the object again, with words in the place of lines that nobody has any more."""
        ends = [part.first_sequence - 1, *(chunk.last_sequence for chunk in chunks)]
        begins = [*(chunk.first_sequence for chunk in chunks), part.last_sequence + 1]
        whole = all(begin == end + 1 for end, begin in zip(ends, begins, strict=True))
        if not whole:
            chunks = [lost_lines(part.first_sequence, part.last_sequence, self._clock())]
        body, blocks = await asyncio.to_thread(packed_blocks, chunks)
        await self._blocks.write(part.key, body)
        await self._store.run(lambda unit: unit.logs.replace_blocks(part.job_id, part.key, blocks, to_us(unit.now)))
        log.error("the object store had lost part of a log", extra={"key": part.key, "mended": whole})
        _lost_parts.add(1, {"mended": str(whole)})

    async def forget_chunks(self) -> None:
        """Removes lines that the object store has had for long, and has been looked at for since we started."""

        async def forget(unit: StorageUnit) -> int:
            before = to_us(unit.now) - round(self._settings.durable_horizon_s * 1e6)
            return await unit.logs.forget_chunks(before, CHUNKS_A_PASS)

        while self.done and await self._store.run(forget) == CHUNKS_A_PASS:
            pass


class LogCheck:
    """Asks after the jobs of live logs: a log whose job's end went past us would never be sealed.

    Each turn goes through all of them, a bounded number a pass, and turns begin a minute apart.
    """

    def __init__(
        self,
        store: Store[StorageUnit],
        inbox: Inbox[StorageUnit],
        handlers: LogHandlers,
        jobs: Jobs,
        settings: StorageSettings,
        *,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._inbox = inbox
        self._jobs = jobs
        self._settings = settings
        self._clock = clock
        self._reached = ""
        self._end_route = Route(JobSucceeded, handlers.end_log, INTERNAL)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._settings.reconcile_s if self._reached else CHECK_S)
            await calmly("check live logs", self.check)

    async def check(self) -> None:
        """One pass, from where the last one stopped."""
        async with self._store.view() as view:
            rows = await view.logs.live(self._reached, ROWS_A_PASS)
        for row in rows:
            await apart("check a live log", row.id, partial(self._check_one, row))
            self._reached = row.id
        if len(rows) < ROWS_A_PASS:
            self._reached = ""

    async def _check_one(self, row: LogRow) -> None:
        job = await self._jobs.get(row.id, row.team_id)
        if job and job.state in OVER:
            await self._end(job)

    async def _end(self, job: Job) -> None:
        """As the event would have done it; whichever way a job ended, its log ends the same."""
        envelope = Envelope(
            id=new_id("event"),
            type=JobSucceeded.ROUTE.type,
            source="storage",
            time=self._clock(),
            object_id=job.id,
            team_id=job.team_id,
        )
        await self._inbox.apply(self._end_route, JobSucceeded(job=job), envelope)


async def _record(unit: StorageUnit, job_id: str, key: str, blocks: tuple[Block, ...]) -> None:
    """The part is in the object store: its blocks take its chunks over."""
    row = await unit.logs.get(job_id)
    assert row is not None
    taken = await unit.logs.compact(job_id, key, blocks, to_us(unit.now))
    await unit.swap(LogRow, row.id, row.revision, {"live_bytes": max(0, row.live_bytes - taken)})


def _part_of(chunks: Sequence[ChunkRow]) -> tuple[bytes, tuple[Block, ...]]:
    """As many of the chunks as make a part, whole ones only."""
    taken: list[Slice] = []
    size = 0
    for chunk in chunks:
        taken.append(unpacked_chunk(chunk.body))
        size += len(taken[-1].text)
        if size > PART_BYTES:
            break
    return packed_blocks(taken)
