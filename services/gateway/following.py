"""Follows one job for one client: its log without a gap or a repeat, its states, and its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from libs.common.clock import utc_now
from libs.common.contracts.messages import (
    GetJob,
    GetLog,
    Job,
    JobDetail,
    JobQueued,
    LogLine,
    LogPage,
    LogSealed,
    Principal,
)
from libs.common.contracts.subjects import subject_for, tail_subject, team_events
from libs.common.errors import MalformedMessage, NotFound, Unavailable
from services.gateway.domain.log_cursor import Advance, advance_by_history, advance_by_tail, skip_to, skipped_mark
from services.gateway.ports import Hint, Hints, Listener, Owners

PAGE = 1000
TERMINAL = frozenset({"succeeded", "failed", "cancelled", "timed_out"})
# After the job's end its log is sealed within moments: look more often then, for a while.
ENDING_POLL_S = 0.25
ENDING_POLLS = 40

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lines:
    lines: tuple[LogLine, ...]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What the job shows just now on lines that it has not ended."""

    lines: tuple[LogLine, ...]


@dataclass(frozen=True, slots=True)
class State:
    job: Job


@dataclass(frozen=True, slots=True)
class End:
    job: Job


@dataclass
class _Standing:
    """How far one follower has come."""

    job: Job
    last: int
    complete: bool = False
    # Negative when the client asked for the last so many lines, until the first page has come.
    tail_first: int = 0
    looks_after_end: int = 0
    skip_behind: int = 0

    @property
    def over(self) -> bool:
        return self.job.state in TERMINAL and self.complete

    def learn(self, job: Job) -> bool:
        """Whether this snapshot is newer than the one known; revisions only grow."""
        if job.revision <= self.job.revision:
            return False
        self.job = job
        return True

    def pause_s(self, poll_s: float) -> float:
        if self.job.state not in TERMINAL:
            return poll_s
        self.looks_after_end += 1
        return min(ENDING_POLL_S, poll_s) if self.looks_after_end <= ENDING_POLLS else poll_s


Step = Lines | Unfinished | State | End
# Given out every few seconds though nothing happened, so that whoever follows can look after the connection.
QUIET = Lines(())


class JobFollower:
    """Live hints make it quick, the stored log and the job's owner make it right: it works without any hint."""

    def __init__(self, owners: Owners, hints: Hints, poll_s: float) -> None:
        self._owners = owners
        self._hints = hints
        self._poll_s = poll_s

    async def job(self, principal: Principal, job_id: str) -> Job:
        return (await self._owners.ask(GetJob(job_id=job_id), JobDetail, principal)).job

    async def follow(
        self, principal: Principal, job: Job, after: int, skip_behind: int = 0
    ) -> AsyncGenerator[Step, None]:
        """From the line after `after` (negative: the last so many lines) to the job's end.

        Args:
            job: as read with `job`, by which its owner has said that this principal may see it.
            skip_behind: whoever falls so many lines behind goes on near the end, past a line that says so; 0: never.

        Raises:
            Closing: the gateway stops.
            NotFound: the job is gone.
        """
        standing = _Standing(job, max(after, 0), tail_first=min(after, 0), skip_behind=skip_behind)
        yield State(job)
        # Listening begins before the first reading: a line is in what is read or in what is heard, or in both.
        async with self._hints.listen(*_subjects(job)) as listener:
            while True:
                async for advance in self._catch_up(principal, standing):
                    yield Lines(advance.lines)
                if standing.learn(await self._fresh(principal, standing.job)):
                    yield State(standing.job)
                if standing.over:
                    yield End(standing.job)
                    return
                async for news in self._hear(listener, standing):
                    yield news
                yield QUIET

    async def _catch_up(self, principal: Principal, standing: _Standing) -> AsyncGenerator[Advance, None]:
        """Reads the stored log to its present end."""
        while True:
            page = await self._read(principal, standing)
            if page is None:
                return
            reached = skip_to(standing.last, page.last_sequence, standing.skip_behind)
            if standing.tail_first == 0 and reached > standing.last:
                yield Advance((skipped_mark(standing.last, reached, utc_now()),), reached, behind=True)
                standing.last = reached
                continue
            advance = advance_by_history(standing.last, page, PAGE)
            # The first page says where the tail begins, but may not hold all of it: an answer has room for so much.
            standing.last, standing.tail_first = advance.last, 0
            if advance.lines:
                yield advance
            if not advance.behind:
                standing.complete = page.complete
                return

    async def _read(self, principal: Principal, standing: _Standing) -> LogPage | None:
        try:
            question = GetLog(
                job_id=standing.job.id, after=standing.tail_first or standing.last, limit=PAGE, sliced=True
            )
            return await self._owners.ask(question, LogPage, principal)
        except (Unavailable, NotFound):
            # Not there yet, or its owner starts again: the client waits, and is told everything later.
            return None

    async def _fresh(self, principal: Principal, known: Job) -> Job:
        try:
            return await self.job(principal, known.id)
        except Unavailable:
            return known

    async def _hear(self, listener: Listener, standing: _Standing) -> AsyncGenerator[Lines | Unfinished | State, None]:
        """Passes hints on until something must be looked up: a gap, an end, or a while without a look."""
        loop = asyncio.get_running_loop()
        until = loop.time() + standing.pause_s(self._poll_s)
        while (left := until - loop.time()) > 0:
            hint = await listener.next(left)
            if hint is None:
                return
            try:
                news, look_now = _understand(hint, standing)
            except MalformedMessage as error:
                log.warning("a hint could not be read", extra={"subject": hint.subject, "reason": str(error)})
                continue
            if news:
                yield news
            if look_now:
                return


def _subjects(job: Job) -> tuple[str, ...]:
    return (
        tail_subject(job.team_id, job.id),
        team_events(job.team_id, JobQueued.ROUTE.aggregate),
        subject_for(LogSealed, team=job.team_id),
    )


def _understand(hint: Hint, standing: _Standing) -> tuple[Lines | Unfinished | State | None, bool]:
    """What a hint says, and whether the owners must be asked now."""
    job = standing.job
    if hint.subject == tail_subject(job.team_id, job.id):
        page = LogPage.from_wire(hint.body)
        if page.unfinished:
            return Unfinished(page.unfinished), False
        advance = advance_by_tail(standing.last, page)
        standing.last = advance.last
        return (Lines(advance.lines) if advance.lines else None), advance.behind or page.complete
    if hint.object_id != job.id:
        return None, False
    if hint.subject == subject_for(LogSealed, team=job.team_id):
        return None, True
    # Every job event carries the whole job under the same name.
    snapshot = JobQueued.from_wire(hint.body).job
    known = standing.learn(snapshot)
    return (State(snapshot) if known else None), snapshot.state in TERMINAL
