"""The follower against owners that say one thing and hints that say another."""

from __future__ import annotations

import asyncio

import pytest

from libs.common.contracts.messages import (
    GetJob,
    GetLog,
    Job,
    JobDetail,
    JobSucceeded,
    LogLine,
    LogPage,
    LogSealed,
)
from libs.common.contracts.subjects import subject_for, tail_subject
from libs.common.errors import Unavailable
from services.gateway.following import End, JobFollower, Lines, State, Step
from services.gateway.ports import Hint
from tests.unit.gateway.fakes import MEMBER, TEAM, FakeHints, FakeOwners

pytestmark = pytest.mark.unit


class Cluster:
    """A job that runs and writes, as its owners would tell it."""

    def __init__(self, poll_s: float = 0.05) -> None:
        self.lines: list[LogLine] = []
        self.job = Job(id="js1", team_id=TEAM, state="running", revision=1)
        self.complete = False
        self.silent = False
        # An answer has room for so many lines, however many were asked for.
        self.room = 10_000
        self.hints = FakeHints()
        owners = FakeOwners({GetJob: self._job, GetLog: self._log})
        self.owners = owners
        self.follower = JobFollower(owners, self.hints, poll_s)

    def _job(self, _: GetJob) -> JobDetail:
        if self.silent:
            raise Unavailable("service_silent", "")
        return JobDetail(job=self.job)

    def _log(self, question: GetLog) -> LogPage:
        if self.silent:
            raise Unavailable("service_silent", "")
        after = question.after
        found = self.lines[after:] if after < 0 else [line for line in self.lines if line.sequence > after]
        last = self.lines[-1].sequence if self.lines else 0
        lines = tuple(found[: min(question.limit, self.room)])
        whole = self.complete and (not lines or lines[-1].sequence == last)
        return LogPage(lines=lines, complete=whole, last_sequence=last)

    def write(self, count: int, *, heard: bool) -> None:
        start = len(self.lines)
        fresh = [LogLine(sequence=start + each + 1, text=f"{start + each + 1}") for each in range(count)]
        self.lines += fresh
        if heard:
            self.tell_lines(*fresh)

    def tell_lines(self, *lines: LogLine) -> None:
        self.hints.give(Hint(tail_subject(TEAM, "js1"), "", LogPage(lines=lines).to_wire()))

    def end(self, *, heard: bool) -> None:
        self.job = self.job.model_copy(update={"state": "succeeded", "revision": self.job.revision + 1})
        self.complete = True
        if heard:
            self.hints.give(Hint(subject_for(JobSucceeded, team=TEAM), "js1", JobSucceeded(job=self.job).to_wire()))
            self.hints.give(Hint(subject_for(LogSealed, team=TEAM), "js1", LogSealed(job_id="js1").to_wire()))

    async def follow(self, after: int = 0) -> list[Step]:
        job = await self.follower.job(MEMBER, "js1")
        return [step async for step in self.follower.follow(MEMBER, job, after) if step != Lines(())]


def sequences(steps: list[Step]) -> list[int]:
    return [line.sequence for step in steps if isinstance(step, Lines) for line in step.lines]


def states(steps: list[Step]) -> list[str]:
    return [step.job.state for step in steps if isinstance(step, State)]


async def settled() -> None:
    """Nothing here waits for anything outside of the loop: so many turns end where only a hint or the clock helps."""
    for _ in range(200):
        await asyncio.sleep(0)


async def ended(following: asyncio.Task[list[Step]]) -> list[Step]:
    async with asyncio.timeout(60):
        return await following


async def looked_again(cluster: Cluster) -> None:
    """Returns when the follower has asked the owners, in vain, a few times more."""
    looks = len(cluster.owners.asked)
    async with asyncio.timeout(60):
        while len(cluster.owners.asked) < looks + 4:
            await asyncio.sleep(0.01)


async def test_a_finished_job_is_told_whole_and_ends() -> None:
    cluster = Cluster()
    cluster.write(2500, heard=False)
    cluster.end(heard=False)
    steps = await cluster.follow()
    assert sequences(steps) == list(range(1, 2501))
    assert isinstance(steps[-1], End)


async def test_live_lines_come_without_a_look_at_the_log() -> None:
    cluster = Cluster(poll_s=600)
    following = asyncio.create_task(cluster.follow())
    await settled()
    looks = len(cluster.owners.of(GetLog))
    cluster.write(5, heard=True)
    await settled()
    assert len(cluster.owners.of(GetLog)) == looks
    cluster.end(heard=True)
    steps = await ended(following)
    assert sequences(steps) == [1, 2, 3, 4, 5]
    assert states(steps) == ["running", "succeeded"]


async def test_a_gap_in_live_lines_is_filled_from_the_log_at_once() -> None:
    cluster = Cluster(poll_s=600)
    following = asyncio.create_task(cluster.follow())
    await settled()
    cluster.write(3, heard=False)
    cluster.write(1, heard=True)
    await settled()
    cluster.end(heard=True)
    assert sequences(await ended(following)) == [1, 2, 3, 4]


async def test_doubled_hints_and_states_are_told_once() -> None:
    cluster = Cluster(poll_s=600)
    following = asyncio.create_task(cluster.follow())
    await settled()
    cluster.write(3, heard=True)
    cluster.tell_lines(*cluster.lines)
    cluster.tell_lines(*cluster.lines)
    cluster.end(heard=True)
    cluster.hints.give(Hint(subject_for(JobSucceeded, team=TEAM), "js1", JobSucceeded(job=cluster.job).to_wire()))
    steps = await ended(following)
    assert sequences(steps) == [1, 2, 3]
    assert states(steps) == ["running", "succeeded"]


async def test_without_any_hint_everything_still_comes() -> None:
    cluster = Cluster()
    following = asyncio.create_task(cluster.follow())
    for _ in range(5):
        cluster.write(7, heard=False)
        await settled()
    cluster.end(heard=False)
    steps = await ended(following)
    assert sequences(steps) == list(range(1, 36))
    assert states(steps) == ["running", "succeeded"]


async def test_a_follower_resumes_after_the_line_it_names() -> None:
    cluster = Cluster()
    cluster.write(10, heard=False)
    cluster.end(heard=False)
    assert sequences(await cluster.follow(after=7)) == [8, 9, 10]


async def test_a_negative_start_gives_the_last_lines_and_what_follows() -> None:
    cluster = Cluster()
    cluster.write(10, heard=False)
    following = asyncio.create_task(cluster.follow(after=-3))
    await settled()
    cluster.write(2, heard=True)
    cluster.end(heard=True)
    assert sequences(await ended(following)) == [8, 9, 10, 11, 12]


@pytest.mark.parametrize(("count", "room"), [(30, 7), (2500, 10_000), (5000, 300)])
async def test_a_tail_that_does_not_fit_one_answer_comes_whole(count: int, room: int) -> None:
    cluster = Cluster()
    cluster.room = room
    cluster.write(5000, heard=False)
    cluster.end(heard=False)
    assert sequences(await cluster.follow(after=-count)) == list(range(5001 - count, 5001))


async def test_a_burst_larger_than_the_queue_is_read_from_the_log() -> None:
    cluster = Cluster(poll_s=600)
    following = asyncio.create_task(cluster.follow())
    await settled()
    for _ in range(1000):
        cluster.write(1, heard=True)
    cluster.end(heard=True)
    assert sequences(await ended(following)) == list(range(1, 1001))


async def test_silent_owners_delay_the_follower_and_do_not_end_it() -> None:
    cluster = Cluster()
    following = asyncio.create_task(cluster.follow())
    await settled()
    cluster.silent = True
    cluster.write(3, heard=False)
    await looked_again(cluster)
    assert not following.done()
    cluster.silent = False
    cluster.end(heard=False)
    assert sequences(await ended(following)) == [1, 2, 3]


async def test_the_stream_does_not_end_before_the_log_is_whole() -> None:
    cluster = Cluster()
    following = asyncio.create_task(cluster.follow())
    await settled()
    cluster.end(heard=True)
    cluster.complete = False
    await looked_again(cluster)
    assert not following.done()
    cluster.write(1, heard=False)
    cluster.complete = True
    steps = await ended(following)
    assert sequences(steps) == [1]


async def test_a_hint_that_cannot_be_read_is_passed_over() -> None:
    cluster = Cluster(poll_s=600)
    following = asyncio.create_task(cluster.follow())
    await settled()
    cluster.hints.give(Hint(tail_subject(TEAM, "js1"), "", b"not json"))
    cluster.write(1, heard=True)
    cluster.end(heard=True)
    assert sequences(await ended(following)) == [1]
