from __future__ import annotations

import asyncio
import gzip
import random
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, update
from sqlmodel import col

from libs.common.clock import to_us
from libs.common.contracts.messages import JobCancelled, JobFailed, JobStarting, JobSucceeded, LogFrame, LogPage, Member
from libs.common.errors import Invalid, Unavailable
from libs.common.loglines import Slice
from services.storage.domain.logs import LOG, nothing_awaited, packed_blocks, unpacked_block
from services.storage.loops.passes import calmly
from services.storage.store import ChunkRow, HeldRow, LogRow, StorageUnit
from tests.unit.storage.world import ATTEMPT, STRANGER, World, frame, job, running_world

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("state", "trigger", "after"),
    [("live", "end", "ended"), ("ended", "end", "ended"), ("ended", "seal", "sealed"), ("sealed", "end", "sealed")],
)
def test_each_trigger_in_each_state(state: str, trigger: str, after: str) -> None:
    assert LOG.next_state("js1", state, trigger) == after


def test_a_log_is_awaited_until_each_started_attempt_has_said_its_last_line() -> None:
    assert nothing_awaited({}, [])
    assert not nothing_awaited({"a": 1}, [])
    assert not nothing_awaited({"a": 1}, [("a", True), ("a", False)])
    assert nothing_awaited({"a": 1}, [("a", True), ("b", True)])
    assert not nothing_awaited({"a": 2}, [("a", True)])
    assert nothing_awaited({"a": 2}, [("a", True), ("a", True)])


async def texts(world: World, limit: int = 0) -> list[str]:
    lines = await world.whole_log(limit)
    assert [line.sequence for line in lines] == list(range(1, len(lines) + 1))
    return [line.text for line in lines]


async def test_lines_are_numbered_over_attempts_and_ranks_as_they_come(world: World) -> None:
    await world.deliver(frame(0, "a", "b"))
    await world.deliver(frame(0, "x", rank=1))
    await world.deliver(frame(2, "c", last=True))
    await world.deliver(frame(0, "again", attempt=2))
    assert await texts(world) == ["a", "b", "x", "c", "again"]
    page = await world.page(after=3)
    assert [(line.attempt, line.rank, line.at) for line in page.lines] == [(1, 0, world.now), (2, 0, world.now)]
    assert [line.sequence for line in await world.heard_lines()] == [1, 2, 3, 4, 5]


async def test_a_frame_delivered_twice_counts_once(world: World) -> None:
    await world.deliver(frame(0, "a"), event_id="ev1")
    await world.deliver(frame(0, "a"), event_id="ev1")
    await world.deliver(frame(0, "a"), event_id="ev2")
    assert await texts(world) == ["a"]


async def test_an_overlapping_frame_adds_what_is_new(world: World) -> None:
    await world.deliver(frame(0, "a", "b"))
    await world.deliver(frame(1, "b", "c"))
    assert await texts(world) == ["a", "b", "c"]


async def test_an_early_frame_waits_for_the_lines_before_it(world: World) -> None:
    await world.deliver(frame(2, "c", last=True))
    await world.deliver(frame(1, "b"))
    assert await texts(world) == []
    await world.deliver(frame(0, "a"))
    assert await texts(world) == ["a", "b", "c"]


async def test_lines_that_never_come_are_marked(world: World) -> None:
    await world.deliver(frame(0, "a"))
    await world.deliver(frame(3, "d"))
    await world.deliver(frame(5, "f"))
    world.later(5)
    await world.keeper.keep_logs()
    assert await texts(world) == ["a"]
    world.later(6)
    await world.keeper.keep_logs()
    marked = ["a", "[2 lines were lost on the way to storage]", "d", "[1 line was lost on the way to storage]", "f"]
    assert await texts(world) == marked
    assert (await world.page(after=1)).lines[0].stream == "nabla"
    await world.deliver(frame(1, "b", "c"))
    assert await texts(world) == marked


async def test_a_frame_of_another_team_is_refused(world: World) -> None:
    await world.deliver(frame(0, "a"))
    with pytest.raises(Invalid):
        await world.deliver(frame(1, "b"), team_id="t2")
    assert await texts(world) == ["a"]


async def test_frames_of_one_batch_are_right_though_one_among_them_is_refused(world: World) -> None:
    frames = [(frame(0, "a"), "t1"), (frame(1, "x"), "t2"), (frame(1, "b"), "t1"), (frame(2, "c"), "t1")]
    outcomes = await asyncio.gather(*(world.deliver(one, team) for one, team in frames), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), Invalid, type(None), type(None)]
    assert await texts(world) == ["a", "b", "c"]


async def test_a_batch_of_frames_reads_its_log_once(world: World) -> None:
    await world.deliver(frame(0, "0"))
    reads: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        if statement.startswith("SELECT"):
            reads.append(statement)

    event.listen(world.store.writer.sync_engine, "before_cursor_execute", note)
    await asyncio.gather(*(world.deliver(frame(number, str(number))) for number in range(1, 41)))
    assert len(reads) == 2
    assert await texts(world) == [str(number) for number in range(41)]


async def test_the_log_is_sealed_when_the_job_ended_and_the_last_frame_came(world: World) -> None:
    await world.deliver(JobStarting(job=job(1, 1)))
    await world.deliver(frame(0, "a"))
    await world.deliver(JobSucceeded(job=job(2, 1)))
    await world.keeper.keep_logs()
    assert not (await world.page()).complete
    await world.deliver(frame(1, "b", last=True))
    assert (await world.page()).complete
    assert not (await world.page(limit=1)).complete
    assert (await world.heard())[-1] == LogPage(complete=True, last_sequence=2)
    await world.keeper.keep_logs()
    assert await world.events() == ["nabla.evt.t1.log.sealed.v1"]
    assert await texts(world) == ["a", "b"]
    await world.deliver(frame(2, "late"))
    await world.deliver(JobSucceeded(job=job(3, 1)))
    await world.keeper.keep_logs()
    assert await texts(world) == ["a", "b"]
    assert len(await world.events()) == 1


async def test_the_log_of_a_gang_is_whole_when_every_rank_has_said_its_last_line(world: World) -> None:
    started = job(1, 1)
    members = (Member(rank=0), Member(rank=1))
    gang = started.model_copy(update={"attempt": started.attempt.model_copy(update={"members": members})})
    await world.deliver(JobStarting(job=gang))
    await world.deliver(frame(0, "a", last=True))
    await world.deliver(JobSucceeded(job=job(2, 1)))
    await world.keeper.keep_logs()
    assert not (await world.page()).complete
    await world.deliver(frame(0, "b", last=True, rank=1))
    await world.keeper.keep_logs()
    page = await world.page()
    assert page.complete
    assert [(line.rank, line.text) for line in page.lines] == [(0, "a"), (1, "b")]
    assert await world.events() == ["nabla.evt.t1.log.sealed.v1"]


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", "timed_out"])
async def test_the_log_of_a_job_whose_end_was_never_heard_is_sealed_all_the_same(world: World, state: str) -> None:
    await world.deliver(frame(0, "a", last=True))
    world.jobs.known["js1"] = job(2, 1).model_copy(update={"state": "running"})
    await world.check.check()
    assert not (await world.page()).complete
    world.jobs.known["js1"] = job(3, 1).model_copy(update={"state": state})
    await world.check.check()
    await world.check.check()
    assert (await world.page()).complete
    await world.keeper.keep_logs()
    assert await world.events() == ["nabla.evt.t1.log.sealed.v1"]


async def test_every_live_log_is_checked_in_its_turn_though_the_scheduler_was_silent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.storage.loops.logs.ROWS_A_PASS", 2)
    ids = [f"js{number}" for number in range(5)]
    for job_id in ids:
        await world.deliver(frame(0, "a", job_id=job_id))
    world.jobs.silent = True
    with pytest.raises(Unavailable):
        await world.check.check()
    world.jobs.silent = False
    for _ in range(6):
        await world.check.check()
    assert world.jobs.asked == ids * 2


async def test_a_job_that_never_started_has_an_empty_whole_log(world: World) -> None:
    await world.deliver(JobCancelled(job=job(1)))
    await world.keeper.keep_logs()
    page = await world.page()
    assert (page.lines, page.complete, page.last_sequence) == ((), True, 0)
    assert await world.events() == ["nabla.evt.t1.log.sealed.v1"]


async def test_an_attempt_that_never_says_its_last_line_is_awaited_for_a_minute(world: World) -> None:
    await world.deliver(JobStarting(job=job(1, 1)))
    await world.deliver(frame(0, "a"))
    await world.deliver(JobFailed(job=job(2, 1)))
    await world.keeping(65)
    assert not (await world.page()).complete
    await world.keeping(10)
    assert (await world.page()).complete
    assert len(await world.events()) == 1


async def test_no_log_is_given_up_on_while_frames_wait_in_the_bus(world: World) -> None:
    await world.deliver(JobStarting(job=job(1, 1)))
    await world.deliver(JobFailed(job=job(2, 1)))
    world.frames.newest, world.frames.settled = 9, 3
    await world.keeping(600)
    assert not (await world.page()).complete
    world.frames.newest, world.frames.settled = 20, 19
    await world.keeping(10)
    await world.deliver(frame(0, "a", last=True))
    await world.keeper.keep_logs()
    assert await texts(world) == ["a"]
    assert len(await world.events()) == 1


async def test_frames_that_never_stop_coming_do_not_keep_a_log_open(world: World) -> None:
    await world.deliver(JobStarting(job=job(1, 1)))
    await world.deliver(JobFailed(job=job(2, 1)))
    for number in range(0, 160, 10):
        world.frames.newest, world.frames.settled = number + 10, number
        await world.keeping(5)
    assert len(await world.events()) == 1


async def test_time_in_which_the_bus_was_away_or_we_were_is_no_patience(world: World) -> None:
    await world.deliver(JobStarting(job=job(1, 1)))
    await world.deliver(JobFailed(job=job(2, 1)))
    await world.keeping(40)
    world.frames.silent = True
    await world.keeping(600)
    world.frames.silent = False
    await world.keeping(60)
    world.later(3600)
    await world.keeping(60)
    assert not (await world.page()).complete
    await world.deliver(frame(0, "a", last=True))
    await world.keeper.keep_logs()
    assert await texts(world) == ["a"]
    assert len(await world.events()) == 1


async def test_the_order_of_job_events_does_not_matter(world: World) -> None:
    await world.deliver(JobSucceeded(job=job(2, 1)))
    await world.deliver(JobStarting(job=job(1, 1)))
    await world.deliver(frame(0, "a", last=True))
    await world.keeper.keep_logs()
    assert (await world.page()).complete


async def test_ranges_are_the_same_live_and_sealed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.storage.domain.logs.BLOCK_BYTES", 1000)
    monkeypatch.setattr("services.storage.loops.logs.PART_BYTES", 300)
    for start in range(0, 100, 10):
        await world.deliver(frame(start, *(f"line {n}" for n in range(start, start + 10)), last=start == 90))
    asked = [(0, 0), (0, 7), (37, 5), (95, 100), (100, 10), (-3, 0), (-3, 2), (-500, 4), (150, 3)]
    live = [(await world.page(*ask)).lines for ask in asked]
    assert [line.text for line in live[2]] == [f"line {n}" for n in range(37, 42)]
    assert [line.text for line in live[5]] == ["line 97", "line 98", "line 99"]
    assert (live[4], live[8]) == ((), ())
    await world.deliver(JobSucceeded(job=job(1)))
    await world.keeper.keep_logs()
    assert len(world.objects.kept) > 1
    assert [(await world.page(*ask)).lines for ask in asked] == live
    async with world.store.view() as view:
        chunks = await view.logs.chunks("js1", 0, 100)
        assert not await view.logs.waiting_chunks("js1", 1)
        assert len(await view.logs.blocks("js1", 0, 100)) > 3
    for _ in chunks:
        # Some in the database and all in the object store, then none in the database.
        await world.store.run(lambda unit: unit.logs.forget_chunks(to_us(world.now) + 1, 1))
        assert [(await world.page(*ask)).lines for ask in asked] == live
    assert await texts(world, limit=9) == [f"line {n}" for n in range(100)]


async def test_an_answer_stays_under_a_megabyte(world: World) -> None:
    for start in range(30):
        await world.deliver(frame(start, "\x01" * 60_000))
    page = await world.page()
    assert 1 < len(page.lines) < 4
    assert len(page.to_wire()) < 1_000_000
    assert len(await texts(world)) == 30


async def test_nobody_else_reads_a_log_or_learns_that_it_exists(world: World) -> None:
    await world.deliver(frame(0, "secret"))
    other = ATTEMPT.model_copy(update={"job_id": "js2"})
    unknown = await world.page(job_id="js9")
    assert [await world.page(asker=asker) for asker in (STRANGER, other)] == [unknown, unknown]
    assert len((await world.page(asker=ATTEMPT)).lines) == 1


async def test_logs_stay_in_the_database_while_the_object_store_is_away(world: World) -> None:
    await world.deliver(frame(0, "a", last=True))
    await world.deliver(JobSucceeded(job=job(1, 1)))
    world.objects.problem = "away"
    with pytest.raises(Exception, match="away"):
        await world.keeper.keep_logs()
    page = await world.page()
    assert (page.complete, page.sealed) == (True, False)
    assert await texts(world) == ["a"]
    world.objects.problem = ""
    await world.keeper.keep_logs()
    assert len(await world.events()) == 1
    assert (await world.page()).sealed


async def test_a_part_written_twice_after_a_kill_changes_nothing(world: World) -> None:
    await world.deliver(frame(0, "a", "b", last=True))
    async with world.store.view() as view:
        lines = (await view.logs.chunks("js1", 0, 9))[0]
    await world.objects.write("log/js1/000000000001", b"half of it, before the kill")
    await world.deliver(JobSucceeded(job=job(1, 1)))
    await world.keeper.keep_logs()
    assert lines.last_sequence == 2
    assert await texts(world) == ["a", "b"]
    assert len(world.objects.kept) == 1


async def test_a_running_jobs_long_log_moves_on_while_it_grows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.storage.loops.logs.LIVE_BYTES", 10)
    await world.deliver(frame(0, "a", "b"))
    await world.keeper.keep_logs()
    await world.deliver(frame(2, "c"))
    async with world.store.view() as view:
        row = await view.logs.get("js1")
        assert isinstance(row, LogRow)
        assert (row.state, len(await view.logs.blocks("js1", 0, 9))) == ("live", 1)
        assert len(await view.logs.waiting_chunks("js1", 9)) == 1
    assert await texts(world) == ["a", "b", "c"]


async def break_chunk(unit: StorageUnit) -> None:
    await unit.session.exec(update(ChunkRow).where(col(ChunkRow.job_id) == "js1").values(body=b"broken"))


async def break_held(unit: StorageUnit) -> None:
    await unit.session.exec(update(HeldRow).where(col(HeldRow.job_id) == "js1").values(frame=b"broken"))


@pytest.mark.parametrize("a_pass", [1, 2, 20])
@pytest.mark.parametrize("refused", [False, True])
async def test_a_log_that_cannot_be_stored_holds_up_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, a_pass: int, refused: bool
) -> None:
    monkeypatch.setattr("services.storage.loops.logs.ROWS_A_PASS", a_pass)
    for number in range(1, 5):
        await world.deliver(frame(0, "a", last=True, job_id=f"js{number}"))
        await world.deliver(JobSucceeded(job=job(1, 1, job_id=f"js{number}")))
    if refused:
        world.objects.refused.add("log/js1/")
    else:
        await world.store.run(break_chunk)
    for _ in range(6):
        await calmly("keep logs", world.keeper.keep_logs)
    assert len(await world.events()) == 3
    world.objects.refused.clear()
    for _ in range(6):
        await calmly("keep logs", world.keeper.keep_logs)
    assert len(await world.events()) == (4 if refused else 3)


@pytest.mark.parametrize("a_pass", [1, 20])
async def test_a_frame_that_cannot_be_read_keeps_no_other_gap_open(
    world: World, monkeypatch: pytest.MonkeyPatch, a_pass: int
) -> None:
    monkeypatch.setattr("services.storage.loops.logs.ROWS_A_PASS", a_pass)
    for number in range(1, 4):
        await world.deliver(frame(1, "b", job_id=f"js{number}"))
    await world.store.run(break_held)
    world.later(11)
    for _ in range(4):
        await world.keeper.keep_logs()
    for job_id in ("js2", "js3"):
        page = await world.page(job_id=job_id)
        assert [line.text for line in page.lines] == ["[1 line was lost on the way to storage]", "b"]


async def test_a_job_that_cannot_be_asked_about_holds_up_no_other(world: World) -> None:
    for number in range(1, 4):
        await world.deliver(frame(0, "a", last=True, job_id=f"js{number}"))
        world.jobs.known[f"js{number}"] = job(2, 1, job_id=f"js{number}").model_copy(update={"state": "failed"})
    world.jobs.refused.add("js1")
    await world.check.check()
    assert [(await world.page(job_id=f"js{number}")).complete for number in range(1, 4)] == [False, True, True]
    world.jobs.refused.clear()
    await world.check.check()
    assert (await world.page(job_id="js1")).complete


async def a_sealed_log(world: World, *, parts: int = 1) -> list[str]:
    lines = [f"line {number}" for number in range(6)]
    for number, text in enumerate(lines):
        await world.deliver(frame(number, text, last=number == 5))
    await world.deliver(JobSucceeded(job=job(1, 1)))
    await world.keeper.keep_logs()
    assert len(world.objects.kept) == parts
    return lines


async def test_lines_stay_in_the_database_until_the_object_store_has_them_on_disk(world: World) -> None:
    lines = await a_sealed_log(world)
    world.later(599)
    await world.start_scrubbing()
    (key,) = world.objects.kept
    del world.objects.kept[key]
    assert await texts(world) == lines
    world.later(2)
    await world.scrub.forget_chunks()
    async with world.store.view() as view:
        assert not await view.logs.chunks("js1", 0, 1)
    with pytest.raises(KeyError):
        await texts(world)


@pytest.mark.parametrize("body", [None, b"", b"half"])
async def test_what_the_object_store_lost_in_a_power_cut_is_written_again(
    world: World, monkeypatch: pytest.MonkeyPatch, body: bytes | None
) -> None:
    monkeypatch.setattr("services.storage.loops.logs.PART_BYTES", 10)
    monkeypatch.setattr("services.storage.loops.logs.ROWS_A_PASS", 2)
    lines = await a_sealed_log(world, parts=3)
    before = dict(world.objects.kept)
    for key in list(before)[1:]:
        del world.objects.kept[key]
        if body is not None:
            world.objects.kept[key] = body
    # However long the machine was off: no line goes from the database before the objects were looked at.
    world.later(86_400)
    await world.start_scrubbing()
    assert world.objects.kept == before
    async with world.store.view() as view:
        assert not await view.logs.chunks("js1", 0, 1)
    assert await texts(world) == lines


async def test_nothing_is_forgotten_or_mended_while_the_object_store_is_away(world: World) -> None:
    lines = await a_sealed_log(world)
    world.later(86_400)
    world.objects.problem = "away"
    with pytest.raises(Unavailable):
        await world.scrub.scrub()
    await world.scrub.forget_chunks()
    assert await texts(world) == lines
    world.objects.problem = ""
    writes = world.objects.writes
    await world.start_scrubbing()
    assert await texts(world) == lines
    assert world.objects.writes == writes


async def test_lines_that_nobody_has_any_more_are_marked_and_the_rest_can_be_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.storage.loops.logs.PART_BYTES", 10)
    lines = await a_sealed_log(world, parts=3)
    world.later(700)
    await world.start_scrubbing()
    del world.objects.kept[sorted(world.objects.kept)[1]]
    await world.start_scrubbing()
    await world.start_scrubbing()
    marked = ["[2 lines were lost by the object store]", ""]
    assert await texts(world) == [*lines[:2], *marked, *lines[4:]]


def test_blocks_are_one_gzip_file_and_the_same_each_time() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    chunks = [Slice.from_lines(frame(0, f"t{n}", "x").lines, now).numbered(2 * n) for n in range(1, 6)]
    body, blocks = packed_blocks(chunks)
    assert packed_blocks(chunks) == (body, blocks)
    assert list(unpacked_block(body).lines()) == [line for chunk in chunks for line in chunk.lines()]
    assert gzip.decompress(body).endswith(b"t1\nx\nt2\nx\nt3\nx\nt4\nx\nt5\nx\n")


@st.composite
def deliveries(draw: st.DrawFn) -> list[LogFrame]:
    """Frames that together cover all lines of two sources, cut, repeated, overlapping and shuffled at will."""
    frames: list[LogFrame] = []
    for rank in (0, 1):
        count = draw(st.integers(1, 12))
        cuts = sorted({0, count, *draw(st.lists(st.integers(0, count), max_size=4))})
        spans = list(pairwise(cuts))
        extra = draw(st.lists(st.tuples(st.integers(0, count), st.integers(0, count)), max_size=4))
        spans += [(min(pair), max(pair)) for pair in extra]
        frames += [
            frame(start, *(f"{rank}:{n}" for n in range(start, end)), rank=rank, last=end == count)
            for start, end in spans
        ]
    frames += draw(st.lists(st.sampled_from(frames), max_size=4))
    draw(st.randoms(use_true_random=False)).shuffle(frames)
    return frames


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(deliveries(), st.integers(0, 2**16))
def test_every_line_comes_once_and_in_the_order_of_its_source(frames: list[LogFrame], seed: int) -> None:
    async def scenario() -> None:
        with TemporaryDirectory() as folder:
            async with running_world(f"sqlite:///{folder}/log.db", Path(folder)) as world:
                together = random.Random(seed).random() < 0.5
                if together:
                    await asyncio.gather(*(world.deliver(one) for one in frames))
                else:
                    for one in frames:
                        await world.deliver(one)
                await world.deliver(JobSucceeded(job=job(1)))
                got = await texts(world)
                for rank in (0, 1):
                    mine = [text for text in got if text.startswith(f"{rank}:")]
                    every = max(one.first_line + len(one.lines) for one in frames if one.rank == rank)
                    assert mine == [f"{rank}:{n}" for n in range(every)]
                assert not any("lost" in text for text in got)
                heard = [line.text for line in await world.heard_lines()]
                assert heard == got
                await world.keeper.keep_logs()
                assert await texts(world) == got
                assert len(await world.events()) == 1

    asyncio.run(scenario())
