"""Lines leave once and in order, also when the process dies between sending and remembering."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from libs.common.contracts.messages import LogFrame
from services.executor.adapters import attempt_log as attempt_log_module
from services.executor.adapters.attempt_log import BODY_BYTES, AttemptLog, Identity
from services.executor.adapters.spool import SpoolWriter

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
            found += [(line.stream, line.text) for line in self.frames[first_line].lines]
        return found


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
    assert (frames[0].job_id, frames[0].attempt, frames[0].lines[0].attempt) == ("js1", 2, 2)


async def test_a_log_without_a_line_still_has_its_last_frame(folder: Path) -> None:
    stream = Stream()
    log = attempt_log(folder, stream)
    log.job_ended()
    log.close()
    await log.ship()
    assert [frame.last for frame in stream.frames.values()] == [True]


@pytest.mark.parametrize("dies_after", [1, 2, 3])
async def test_a_death_at_any_frame_loses_and_doubles_nothing(dies_after: int, folder: Path) -> None:
    stream = Stream()
    stream.dies_after = dies_after
    log = attempt_log(folder, stream)
    log.say("environment", "environment: default")
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


async def test_a_line_of_escapes_and_bytes_that_are_no_text_fits_into_a_frame(folder: Path) -> None:
    """Six bytes for each escape and three for each bad byte: a frame that the bus refuses would hold the end up."""
    stream = Stream()
    log = attempt_log(folder, stream)
    spooled(folder, b"\x1b" * 22_000 + b"\xff" * 43_000 + b"\n")
    log.job_ended()
    log.close()
    await log.ship()
    assert [text[-4:] for _, text in stream.lines()] == ["cut]"]


async def test_unfinished_lines_wait_for_company_but_the_first_does_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_log_module, "BATCH_S", 600.0)
    stream = Stream()
    log = attempt_log(folder, stream)
    shipping = asyncio.create_task(log.ship())
    writer = SpoolWriter(folder / "spool", 1 << 20)
    for number in range(20):
        writer.write("o", b"%d\n" % number, NOW_US)
        log._changed.set()
        for _ in range(20):
            await asyncio.sleep(0)
    assert [len(frame.lines) for frame in stream.frames.values()] == [1]
    shipping.cancel()
    log._sent_s = float("-inf")  # as when the time has passed
    log.job_ended()
    log.close()
    writer.close(NOW_US)
    async with asyncio.timeout(60):
        await log.ship()
    assert [len(frame.lines) for frame in stream.frames.values() if frame.lines] == [1, 19]
