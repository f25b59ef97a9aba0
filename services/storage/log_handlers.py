"""Frames become a job's log, the scheduler's events say when it ends, and queries read it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from libs.common.clock import from_us, to_us
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    GetLog,
    Job,
    JobCancelled,
    JobFailed,
    JobStarting,
    JobSucceeded,
    JobTimedOut,
    LogFrame,
    LogPage,
    Principal,
)
from libs.common.errors import Invalid, Unavailable
from libs.common.loglines import Slice
from libs.common.store import Store
from libs.common.telemetry import meter
from services.storage.adapters.tail import Tail
from services.storage.domain.logs import (
    ENDED,
    LOG,
    SEALED,
    Intake,
    PageCutter,
    is_early,
    lines_of,
    lost_mark,
    nothing_awaited,
    packed_chunk,
    start_after,
    unpacked_block,
    unpacked_chunk,
)
from services.storage.ports import BlockStore
from services.storage.settings import StorageSettings
from services.storage.store import AttemptRow, BlockRow, HeldRow, LogRow, SourceRow, StorageUnit

JobOver = JobSucceeded | JobFailed | JobCancelled | JobTimedOut
PIECES = 100

_lines = meter().create_counter("nabla_log_lines_total", description="Log lines taken in")
_late_frames = meter().create_counter("nabla_log_late_frames_total", description="Frames that came after the seal")


class LogHandlers:
    def __init__(self, store: Store[StorageUnit], blocks: BlockStore, tail: Tail, settings: StorageSettings) -> None:
        self._store = store
        self._blocks = blocks
        self._tail = tail
        self._settings = settings
        # A log may have become whole: the loop that seals looks once this is committed.
        self.may_be_whole = False
        self.intake = Intake(timedelta(seconds=settings.last_frame_patience_s / 2))

    async def note_attempt(self, message: JobStarting, unit: StorageUnit, call: Envelope) -> None:
        """A new attempt: its last frame will be awaited, and older attempts can no longer write artifacts."""
        await self._job_row(message.job, unit)

    async def end_log(self, message: JobOver, unit: StorageUnit, call: Envelope) -> None:
        """The job is terminal: its log ends when the last frames have come."""
        row = await self._job_row(message.job, unit)
        state = LOG.next_state(row.id, row.state, "end")
        if state == row.state:
            return
        await unit.save_log(row, {"state": state, "ended_us": to_us(unit.now)})
        await self._tell_if_whole(unit, row)

    async def take_frame(self, message: LogFrame, unit: StorageUnit, call: Envelope) -> None:
        """Gives the lines that are new their place in the job's log; a frame that is early waits for its turn."""
        log = await self._log_for(message, unit, call)
        if log is None:
            return
        source = await _source(message, unit)
        if is_early(source.next_line, message):
            await unit.logs.hold(_held(message, to_us(unit.now)))
            source.holds = True
            return
        await self._append(unit, log, source, message)
        if source.holds:
            await self._drain(unit, log, source, pass_gaps_before_us=0)
        await self._tell_if_whole(unit, log)

    async def close_gaps(self, message: LogFrame, unit: StorageUnit, call: Envelope) -> None:
        """Marks as lost what frames of this job have waited for in vain. Sent by our own loop, through the inbox, so
        that all lines of all logs are numbered one after the other."""
        log = await unit.logs.get(message.job_id)
        if log is None or log.state == SEALED:
            return
        patience_us = round(self._settings.gap_patience_s * 1e6)
        for attempt_id, rank in sorted({(row.attempt_id, row.rank) for row in await unit.logs.held(log.id)}):
            source = await unit.logs.source(log.id, attempt_id, rank)
            assert source is not None
            await self._drain(unit, log, source, pass_gaps_before_us=to_us(unit.now) - patience_us)
        await self._tell_if_whole(unit, log)

    async def prepare_page(self, message: GetLog, call: Envelope) -> LogPage:
        """Reads a page from the object store and the database, whichever has the lines.

        A job that storage has not heard of has an empty log so far, as has one that the asker may not know of.
        """
        async with self._store.view() as view:
            log = await view.logs.get(message.job_id)
            if log is None or not _may_read(log, call.principal):
                return LogPage()
            whole = await self.is_whole(view, log)
        page = PageCutter(start_after(message.after, log.last_sequence), message.limit, sliced=message.sliced)
        while not page.full and page.position < log.last_sequence:
            before = page.position
            await self._read_some(log.id, page)
            if page.position == before:
                raise Unavailable("log_moved", "The log was being moved while it was read.", "Try again.")
        complete = whole and page.position >= log.last_sequence
        return LogPage(
            lines=tuple(page.lines),
            slices=tuple(page.slices),
            complete=complete,
            last_sequence=log.last_sequence,
            sealed=log.state == SEALED,
        )

    async def get_log(self, message: GetLog, view: StorageUnit, call: Envelope) -> LogPage:
        page = call.facts
        assert isinstance(page, LogPage)
        return page

    async def _read_some(self, job_id: str, page: PageCutter) -> None:
        """The next lines. Chunks are looked up first: lines move from chunks to blocks and never back."""
        async with self._store.view() as view:
            chunks = await view.logs.chunks(job_id, page.position, PIECES)
            blocks: Sequence[BlockRow] = ()
            if not chunks or chunks[0].first_sequence > page.position + 1:
                blocks = await view.logs.blocks(job_id, page.position, PIECES)
        for block in blocks:
            if page.full:
                return
            body = await self._blocks.read(block.key, block.offset_bytes, block.length_bytes)
            page.add(unpacked_block(body))
        for chunk in chunks:
            if page.full:
                return
            page.add(unpacked_chunk(chunk.body))

    async def _job_row(self, job: Job, unit: StorageUnit) -> LogRow:
        """The log of this job, made if need be, with the attempt that the snapshot shows."""
        row = await unit.logs.get(job.id)
        if row is None:
            row = LogRow(id=job.id, team_id=job.team_id, project_id=job.project_id, job_revision=job.revision)
            await unit.logs.add(row)
        elif job.revision > row.job_revision:
            await unit.save_log(row, {"job_revision": job.revision, "project_id": job.project_id})
        attempt = job.attempt
        if row.state != SEALED and attempt.id and not await unit.logs.attempt(job.id, attempt.id):
            ranks = max(1, len(attempt.members))
            await unit.logs.add(
                AttemptRow(job_id=job.id, attempt_id=attempt.id, number=attempt.number, rank_count=ranks)
            )
        return row

    async def _log_for(self, frame: LogFrame, unit: StorageUnit, call: Envelope) -> LogRow | None:
        """The log that the frame belongs to, or None when that is sealed already."""
        row = await unit.logs.get(frame.job_id)
        if row is None:
            row = LogRow(id=frame.job_id, team_id=call.team_id, project_id=call.project_id)
            await unit.logs.add(row)
        if row.team_id != call.team_id:
            detail = f"A log frame for job {frame.job_id} came under another team."
            raise Invalid("frame_of_other_team", detail)
        if row.state == SEALED:
            _late_frames.add(1)
            return None
        return row

    async def _append(self, unit: StorageUnit, log: LogRow, source: SourceRow, frame: LogFrame) -> None:
        """Writes down the frame's new lines and how far the source has come."""
        lines = lines_of(frame, unit.now)
        fresh = lines.without(source.next_line - frame.first_line)
        source.next_line = max(source.next_line, frame.first_line + lines.line_count)
        if frame.last and not source.last:
            source.last = True
        if fresh.batches:
            await self._write(unit, log, fresh)

    async def _write(self, unit: StorageUnit, log: LogRow, fresh: Slice) -> None:
        lines = fresh.numbered(log.last_sequence + 1)
        last = lines.last_sequence
        body = packed_chunk(lines)
        await unit.logs.add_chunk(log.id, lines.first_sequence, last, body)
        moved = {
            "last_sequence": last,
            "size_bytes": log.size_bytes + len(lines.text),
            "live_bytes": log.live_bytes + len(body),
        }
        await unit.save_log(log, moved)
        page = LogPage(slices=(lines.to_message(),), last_sequence=last)
        self._tail.collect(unit, log.team_id, log.id, page.to_wire())
        _lines.add(lines.line_count)

    async def _drain(self, unit: StorageUnit, log: LogRow, source: SourceRow, *, pass_gaps_before_us: int) -> None:
        """Takes early frames whose turn has come, and over a gap those that came before that moment."""
        for row in await unit.logs.held(log.id, source.attempt_id, source.rank):
            frame = LogFrame.from_wire(row.frame)
            if is_early(source.next_line, frame):
                if row.arrived_us >= pass_gaps_before_us:
                    return
                mark = lost_mark(frame, source.next_line, unit.now)
                await self._write(unit, log, mark)
                source.next_line = frame.first_line
            await self._append(unit, log, source, frame)
            await unit.logs.release(row)
        source.holds = False

    async def is_whole(self, unit: StorageUnit, log: LogRow) -> bool:
        """Whether no line will come any more."""
        if log.state == SEALED:
            return True
        if log.state != ENDED or log.ended_us is None or await unit.logs.held(log.id):
            return False
        if self.intake.settled_s(from_us(log.ended_us)) > self._settings.last_frame_patience_s:
            return True
        return nothing_awaited(*await unit.logs.attempts_and_sources(log.id))

    async def _tell_if_whole(self, unit: StorageUnit, log: LogRow) -> None:
        """Tells live followers that the log is whole, and the sealing loop that there may be work."""
        if log.state != ENDED:
            return
        await unit.session.flush()
        self.may_be_whole = True
        if await self.is_whole(unit, log):
            page = LogPage(complete=True, last_sequence=log.last_sequence)
            self._tail.collect(unit, log.team_id, log.id, page.to_wire())


def _may_read(log: LogRow, asker: Principal) -> bool:
    return log.team_id == asker.team_id and (asker.kind != "attempt" or asker.job_id == log.id)


async def _source(frame: LogFrame, unit: StorageUnit) -> SourceRow:
    source = await unit.logs.source(frame.job_id, frame.attempt_id, frame.rank)
    if source is None:
        source = SourceRow(job_id=frame.job_id, attempt_id=frame.attempt_id, rank=frame.rank)
        await unit.logs.add(source)
    return source


def _held(frame: LogFrame, now_us: int) -> HeldRow:
    return HeldRow(
        job_id=frame.job_id,
        attempt_id=frame.attempt_id,
        rank=frame.rank,
        first_line=frame.first_line,
        line_count=len(frame.lines) + sum(batch.line_count for batch in frame.slice.batches),
        arrived_us=now_us,
        frame=frame.to_wire(),
    )
