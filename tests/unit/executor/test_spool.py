"""The log spool: what a job printed comes out again, bounded and in order, whatever it printed."""

import os
import random
from pathlib import Path

import pytest

from services.executor.adapters.attempts.spool import (
    LINE_LIMIT_BYTES,
    LogLine,
    SpoolBatch,
    SpoolReader,
    SpoolWriter,
    Stream,
)

pytestmark = pytest.mark.unit

MIB = 1024 * 1024


def write_all(directory: Path, chunks: list[bytes], stream: Stream = "o", **limits: int) -> None:
    writer = SpoolWriter(directory, **{"log_limit_bytes": 64 * MIB} | limits)
    for at_us, chunk in enumerate(chunks):
        writer.write(stream, chunk, at_us)
    writer.close(len(chunks))


def read_all(directory: Path, **bounds: int) -> list[LogLine]:
    reader, lines = SpoolReader(directory), list[LogLine]()
    while batch := reader.read_from(lines[-1].number + 1 if lines else 0, **bounds):
        lines += batch
    return lines


def joined(lines: list[LogLine]) -> str:
    return "".join(line.text + ("\n" if line.newline else "") for line in lines)


def test_lines_come_back_with_time_stream_and_number(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, MIB)
    writer.write("o", b"one\ntwo\n", 10)
    writer.write("e", b"oops\n", 20)
    writer.close(30)
    assert read_all(tmp_path) == [
        LogLine(0, 10, "o", "one"),
        LogLine(1, 10, "o", "two"),
        LogLine(2, 20, "e", "oops"),
    ]


def test_reader_follows_while_it_is_written(tmp_path: Path) -> None:
    writer, reader = SpoolWriter(tmp_path, MIB), SpoolReader(tmp_path)
    assert reader.read_from(0) == []
    writer.write("o", b"a\nb\nc", 1)
    assert [line.text for line in reader.read_from(0)] == ["a", "b"]
    assert reader.read_from(2) == []
    writer.write("o", b"d\n", 2)
    assert reader.read_from(2) == [LogLine(2, 2, "o", "cd")]
    writer.close(3)


def test_a_prompt_is_shown_at_once_and_kept_when_it_stands(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, MIB)
    writer.write("o", b"password: ", 1)
    assert writer.unfinished() == {"o": "password: "}
    settle_at_us = writer.settle_at_us or 0
    writer.settle(settle_at_us - 1)
    assert read_all(tmp_path) == []
    writer.settle(settle_at_us)
    assert (writer.settle_at_us, writer.unfinished()) == (None, {})
    writer.write("o", b"ok\n", settle_at_us + 3)
    writer.close(settle_at_us + 4)
    assert read_all(tmp_path) == [
        LogLine(0, settle_at_us, "o", "password: ", newline=False),
        LogLine(1, settle_at_us + 3, "o", "ok"),
    ]


def test_a_progress_bar_is_shown_as_it_moves_and_kept_as_it_ended(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, MIB)
    shown = []
    for percent in range(101):
        writer.write("e", b"\r%3d%%" % percent, percent * 500_000)
        writer.settle(percent * 500_000)
        shown.append(writer.unfinished()["e"])
    assert shown == [f"{percent:3d}%" for percent in range(101)]
    writer.write("e", b"\nnext\n", 60_000_000)
    writer.close(60_000_001)
    assert [line.text for line in read_all(tmp_path)] == ["100%", "next"]


def test_a_progress_bar_that_stands_still_is_kept(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, MIB)
    writer.write("e", b"10%\r20%\r", 0)
    writer.settle(9_000_000)
    assert read_all(tmp_path) == []
    writer.settle(10_000_000)
    assert [line.text for line in read_all(tmp_path)] == ["20%"]
    writer.close(0)


@pytest.mark.parametrize(
    ("chunks", "texts"),
    [
        ([b"10%\r20%\r", b"100%\r\n"], ["100%"]),
        ([b"one\r\ntwo\r", b"\n"], ["one", "two"]),
        ([b"a\rb", b"c\nd\n"], ["bc", "d"]),
        ([b"\r\r\n", b"x\r"], ["", "x"]),
        ([b"\r" * 100_000, b"end\n"], ["end"]),
    ],
)
def test_carriage_returns_leave_what_a_terminal_would_show_last(
    tmp_path: Path, chunks: list[bytes], texts: list[str]
) -> None:
    write_all(tmp_path, chunks)
    assert [line.text for line in read_all(tmp_path)] == texts


def test_a_bar_never_grows_in_memory(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, MIB)
    for number in range(1000):
        writer.write("o", b"x" * 1000 + b"%d\r" % number, number)
    assert writer.unfinished() == {"o": "x" * 1000 + "999"}
    assert len(writer._unfinished["o"].text) < 1100


def test_long_line_is_split_between_characters(tmp_path: Path) -> None:
    text = "x" + "é" * (5 * MIB)
    write_all(tmp_path, [text.encode() + b"\nend\n"])
    lines = read_all(tmp_path)
    assert joined(lines) == text + "\nend\n"
    assert max(len(line.text.encode()) for line in lines) <= LINE_LIMIT_BYTES
    assert [line.newline for line in lines[:-2]] == [False] * (len(lines) - 2)


def test_bytes_that_are_not_text_are_replaced(tmp_path: Path) -> None:
    write_all(tmp_path, [b"\xff\xfe\x00ok\n", b"\x80" * 200_000 + b"\n"])
    lines = read_all(tmp_path)
    assert lines[0].text == "\ufffd\ufffd\x00ok"
    assert sum(len(line.text) for line in lines[1:]) == 200_000


def test_any_cut_of_the_input_reads_the_same(tmp_path: Path) -> None:
    seed = 20
    randomness = random.Random(seed)
    text = b"".join(b"%d " % i * randomness.randrange(400) + b"\n" for i in range(3000))
    chunks, rest = list[bytes](), text
    while rest:
        size = randomness.choice([1, 7, 4096, 262_144])
        chunks.append(rest[:size])
        rest = rest[size:]
    write_all(tmp_path, chunks)
    lines = read_all(tmp_path, max_lines=77)
    assert joined(lines) == text.decode()
    assert [line.number for line in lines] == list(range(3000))


def test_reading_can_begin_anywhere(tmp_path: Path) -> None:
    write_all(tmp_path, [b"%d\n" % i for i in range(1000)], segment_bytes=1024)
    for number in (999, 0, 500, 501, 250):
        assert SpoolReader(tmp_path).read_from(number, max_lines=1)[0].text == str(number)
    assert SpoolReader(tmp_path).read_from(1000) == []


def test_bounds_of_a_read_hold_but_one_line_always_comes(tmp_path: Path) -> None:
    write_all(tmp_path, [b"a" * 5000 + b"\n" + b"b\n" * 10])
    reader = SpoolReader(tmp_path)
    assert len(reader.read_from(0, max_bytes=100)) == 1
    assert len(reader.read_from(1, max_bytes=3)) == 3
    assert len(reader.read_from(1, max_lines=4)) == 4


def test_past_its_limit_the_log_ends_with_a_line_that_says_so(tmp_path: Path) -> None:
    line = b"x" * 99 + b"\n"
    write_all(tmp_path, [line * 1000] * 100, log_limit_bytes=MIB)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= MIB + 1000
    *kept, limit, missing = read_all(tmp_path)
    assert (limit.stream, "limit of 1,048,576 bytes is reached" in limit.text) == ("n", True)
    assert len(kept) + missing.dropped == 100_000
    assert f"{missing.dropped:,} lines are missing" in missing.text


def test_below_the_limit_nothing_is_dropped_however_far_behind_the_reader_is(tmp_path: Path) -> None:
    line = b"y" * 99 + b"\n"
    write_all(tmp_path, [line * 1000] * 200)
    assert len(read_all(tmp_path)) == 200_000


def test_freed_segments_do_not_make_the_limit_larger(tmp_path: Path) -> None:
    writer, reader, seen = SpoolWriter(tmp_path, MIB, segment_bytes=64 * 1024), SpoolReader(tmp_path), 0
    for _ in range(40):
        writer.write("o", (b"y" * 99 + b"\n") * 1000, 1)
        while batch := reader.read_from(seen, max_lines=100_000):
            seen += len(batch)
        reader.acknowledge(seen)
    writer.close(2)
    assert len(list(tmp_path.iterdir())) <= 2
    assert 9_000 < seen < 11_000


def test_batches_are_the_lines(tmp_path: Path) -> None:
    write_all(tmp_path, [b"a\nb\nc\n", b"d\n", b"z" * 70_000, b"\nend"])
    lines, batches = read_all(tmp_path), list[SpoolBatch]()
    for limit in (1, 2, 3, 50):
        batches, next_line = [], 0
        while found := SpoolReader(tmp_path).batches_from(next_line, limit, 100_000):
            assert 1 <= sum(batch.line_count for batch in found) <= limit
            batches += found
            next_line = found[-1].first_line + found[-1].line_count
        whole = b"".join(batch.payload if not batch.cut else batch.payload + b"\n" for batch in batches)
        assert whole.decode().split("\n")[:-1] == [line.text for line in lines]
        assert [batch.cut for batch in batches if batch.line_count == 1][-1:] == [True]


def test_acknowledging_half_a_segment_keeps_it(tmp_path: Path) -> None:
    write_all(tmp_path, [b"%d\n" % i for i in range(100)])
    reader = SpoolReader(tmp_path)
    reader.acknowledge(50)
    reader.acknowledge(100)
    assert len(read_all(tmp_path)) == 100


def test_lines_freed_already_are_skipped(tmp_path: Path) -> None:
    write_all(tmp_path, [b"%d\n" % i for i in range(1000)], segment_bytes=1024)
    reader = SpoolReader(tmp_path)
    reader.acknowledge(700)
    first = reader.read_from(0, max_lines=1)[0].number
    assert 0 < first <= 700


@pytest.mark.parametrize("kept", [1, 10, 31, 33, 40])
def test_torn_last_record_is_the_end_of_the_log(tmp_path: Path, kept: int) -> None:
    write_all(tmp_path, [b"whole\n"])
    segment = next(tmp_path.iterdir())
    whole = segment.stat().st_size
    write_all_again = SpoolWriter(tmp_path / "other", MIB)
    (tmp_path / "other").mkdir()
    write_all_again.write("o", b"torn line of some length\n", 2)
    write_all_again.close(3)
    torn = next((tmp_path / "other").iterdir()).read_bytes()[:kept]
    with segment.open("ab") as file:
        file.write(torn)
    assert [line.text for line in read_all(tmp_path)] == ["whole"]
    os.truncate(segment, whole)
    assert [line.text for line in read_all(tmp_path)] == ["whole"]


def test_zeroes_left_by_a_power_cut_are_the_end_of_the_log(tmp_path: Path) -> None:
    write_all(tmp_path, [b"whole\n"])
    with next(tmp_path.iterdir()).open("ab") as file:
        file.write(bytes(4096))
    assert [line.text for line in read_all(tmp_path)] == ["whole"]
