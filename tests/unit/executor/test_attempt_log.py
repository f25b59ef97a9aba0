"""Lines leave once and in order, also when the process dies between sending and remembering."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from libs.common.contracts.messages import LogFrame, LogLine
from libs.common.loglines import Slice
from services.executor.adapters.agent import attempt_log as attempt_log_module
from services.executor.adapters.agent.attempt_log import BODY_BYTES, AttemptLog, Identity
from services.executor.adapters.attempts.spool import SpoolWriter

pytestmark = pytest.mark.unit
NOW_US = 1_700_000_000_000_000


class Stream:
    """JetStream's de-duplication: the first body of an id counts. `dies_after` loses the answer of that frame."""

    def __init__(self) -> None:
        self.frames: dict[int, LogFrame] = {}
        self.dies_after: int | None = None

    async def send(self, first_line: int, body: bytes) -> None:
        assert len(body) <= BODY_BYTES
        self.frames.setdefault(first_line, LogFrame.from_wire(body))
        if self.dies_after == len(self.frames):
            self.dies_after = None
            raise ConnectionAbortedError

    def lines(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for first_line in sorted(self.frames):
            assert first_line == len(found)
            found += [(line.stream, line.text) for line in lines_of(self.frames[first_line])]
        return found


def lines_of(frame: LogFrame) -> list[LogLine]:
    return list(Slice.from_message(frame.slice).of(frame.attempt, frame.rank).lines())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir()
    return tmp_path


def attempt_log(folder: Path, stream: Stream) -> AttemptLog:
    return AttemptLog(folder, Identity("js1", "at1", 2), stream.send, asyncio.Event())


def spooled(folder: Path, *texts: bytes) -> None:
    writer = SpoolWriter(folder / "spool", 1 << 28)
    for text in texts:
        writer.write("o", text, NOW_US)
    writer.close(NOW_US)


async def test_words_come_first_the_job_next_and_the_end_last(folder: Path) -> None:
    stream = Stream()
    log = attempt_log(folder, stream)
    log.say("environment", "environment: default")
    log.say("environment", "said twice")
    log.say("end", "exit code 0", tail=True)
    spooled(folder, b"one\ntwo\n", b"not ended")
    log.job_ended()
    log.close()
    await log.ship()
    assert stream.lines() == [
        ("nabla", "environment: default"),
        ("stdout", "one"),
        ("stdout", "two"),
        ("stdout", "not ended"),
        ("nabla", "exit code 0"),
    ]
    frames = [stream.frames[number] for number in sorted(stream.frames)]
    assert [frame.last for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert (frames[0].job_id, frames[0].attempt) == ("js1", 2)
    assert [line.cut for frame in frames for line in lines_of(frame)] == [False, False, False, True, False]


async def test_a_log_without_a_line_still_has_its_last_frame(folder: Path) -> None:
    stream = Stream()
    log = attempt_log(folder, stream)
    log.job_ended()
    log.close()
    await log.ship()
    assert [frame.last for frame in stream.frames.values()] == [True]


@pytest.mark.parametrize("dies_after", [1, 2, 3])
async def test_a_death_at_any_frame_loses_and_doubles_nothing(
    dies_after: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream()
    stream.dies_after = dies_after
    log = attempt_log(folder, stream)
    log.say("environment", "environment: default")
    monkeypatch.setattr(attempt_log_module, "FRAME_LINES", 800)
    spooled(folder, b"".join(b"%d\n" % number for number in range(2000)))
    shipping = asyncio.create_task(log.ship())
    log.job_ended()
    with pytest.raises(ConnectionAbortedError):
        await shipping
    again = attempt_log(folder, stream)
    again.say("environment", "another one")
    again.say("end", "exit code 0", tail=True)
    again.job_ended()
    again.close()
    await again.ship()
    texts = [text for _, text in stream.lines()]
    assert texts == ["environment: default", *map(str, range(2000)), "exit code 0"]


async def test_a_frame_whose_answer_was_lost_is_sent_again_as_it_was(folder: Path) -> None:
    stream = Stream()
    stream.dies_after = 1
    log = attempt_log(folder, stream)
    writer = SpoolWriter(folder / "spool", 1 << 20)
    writer.write("o", b"one\n", NOW_US)
    with pytest.raises(ConnectionAbortedError):
        await log.ship()
    writer.write("o", b"two\n", NOW_US)
    writer.close(NOW_US)
    log.job_ended()
    log.close()
    await log.ship()
    assert [text for _, text in stream.lines()] == ["one", "two"]


async def test_half_a_word_written_at_a_crash_is_forgotten(folder: Path) -> None:
    log = attempt_log(folder, Stream())
    log.say("a", "whole")
    with (folder / "words.jsonl").open("a") as file:
        file.write('{"key": "b", "at_')
    stream = Stream()
    again = attempt_log(folder, stream)
    again.say("c", "after")
    again.job_ended()
    again.close()
    await again.ship()
    assert [text for _, text in stream.lines()] == ["whole", "after"]


async def test_hostile_bytes_never_make_a_frame_too_large(folder: Path) -> None:
    stream = Stream()
    log = attempt_log(folder, stream)
    spooled(folder, b"\x00" * 300_000 + b"\n", b"\x1b" * 300_000 + b"\n", "ü".encode() * 100_000, b'"\\' * 100_000)
    log.job_ended()
    log.close()
    await log.ship()
    assert stream.lines()
    assert next(reversed(stream.frames.values())).last


async def test_a_flood_that_cannot_be_compressed_fits_into_frames(folder: Path) -> None:
    """A frame that the bus refuses would hold the end up for ever."""
    stream = Stream()
    log = attempt_log(folder, stream)
    noise = random.Random(7).randbytes(2_000_000)
    spooled(folder, noise)
    log.job_ended()
    log.close()
    await log.ship()
    assert len(stream.lines()) == noise.replace(b"\r\n", b"\n").count(b"\n") + 1


async def test_unfinished_lines_wait_for_company_but_the_first_does_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_back, go_on, sleep = asyncio.Event(), asyncio.Event(), asyncio.sleep

    async def hold_back(_: float) -> None:
        held_back.set()
        await go_on.wait()

    monkeypatch.setattr(attempt_log_module, "BATCH_S", 3600.0)
    monkeypatch.setattr(asyncio, "sleep", hold_back)
    stream = Stream()
    log = attempt_log(folder, stream)
    shipping = asyncio.create_task(log.ship())
    writer = SpoolWriter(folder / "spool", 1 << 20)

    def write(number: int) -> None:
        writer.write("o", b"%d\n" % number, NOW_US)
        log._changed.set()

    write(0)
    async with asyncio.timeout(60):
        while not stream.frames:
            await sleep(0.01)
        write(1)
        await held_back.wait()
        for number in range(2, 20):
            write(number)
        go_on.set()
        while len(stream.frames) < 2:
            await sleep(0.01)
    shipping.cancel()
    assert [len(lines_of(frame)) for frame in stream.frames.values()] == [1, 19]
