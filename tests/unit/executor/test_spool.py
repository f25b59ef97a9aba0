"""The log spool: what a job printed comes out again, bounded and in order, whatever it printed."""

import os
import random
from pathlib import Path

import pytest

from services.executor.adapters.spool import LINE_LIMIT_BYTES, LogLine, SpoolReader, SpoolWriter, Stream

pytestmark = pytest.mark.unit

MIB = 1024 * 1024


def write_all(directory: Path, chunks: list[bytes], max_bytes: int = 64 * MIB, stream: Stream = "o") -> None:
    writer = SpoolWriter(directory, max_bytes)
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


def test_unfinished_line_is_seen_after_a_flush_and_marked(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, MIB)
    writer.write("o", b"password: ", 1)
    before = writer.has_partial
    writer.flush(2)
    assert (before, writer.has_partial) == (True, False)
    writer.write("o", b"ok\n", 3)
    writer.close(4)
    assert read_all(tmp_path) == [
        LogLine(0, 2, "o", "password: ", newline=False),
        LogLine(1, 3, "o", "ok"),
    ]


def test_progress_bar_stays_within_its_line(tmp_path: Path) -> None:
    write_all(tmp_path, [b"10%\r20%\r", b"100%\r\n"])
    assert [line.text for line in read_all(tmp_path)] == ["10%\r20%\r100%\r"]


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
    write_all(tmp_path, [b"%d\n" % i for i in range(1000)], max_bytes=8192 * 10)
    for number in (999, 0, 500, 501, 250):
        assert SpoolReader(tmp_path).read_from(number, max_lines=1)[0].text == str(number)
    assert SpoolReader(tmp_path).read_from(1000) == []


def test_bounds_of_a_read_hold_but_one_line_always_comes(tmp_path: Path) -> None:
    write_all(tmp_path, [b"a" * 5000 + b"\n" + b"b\n" * 10])
    reader = SpoolReader(tmp_path)
    assert len(reader.read_from(0, max_bytes=100)) == 1
    assert len(reader.read_from(1, max_bytes=3)) == 3
    assert len(reader.read_from(1, max_lines=4)) == 4


def test_flood_without_a_reader_is_bounded_and_the_gap_is_named(tmp_path: Path) -> None:
    line = b"x" * 99 + b"\n"
    write_all(tmp_path, [line * 1000] * 100, max_bytes=MIB)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= MIB + 100
    lines = read_all(tmp_path)
    assert lines[-1].dropped > 0
    assert len(lines) - 1 + lines[-1].dropped == 100_000
    assert str(lines[-1].dropped) in lines[-1].text


def test_acknowledged_segments_make_room_again(tmp_path: Path) -> None:
    writer, reader = SpoolWriter(tmp_path, MIB), SpoolReader(tmp_path)
    seen, missing = 0, 0
    for _ in range(200):
        writer.write("o", (b"y" * 99 + b"\n") * 1000, 1)
        while batch := reader.read_from(seen + missing, max_lines=100_000):
            missing += sum(1 for line in batch if line.dropped)
            seen += sum(1 for line in batch if not line.dropped)
        reader.acknowledge(seen + missing)
    writer.close(2)
    assert (seen, missing) == (200_000, 0)
    assert len(list(tmp_path.iterdir())) <= 2


def test_acknowledging_half_a_segment_keeps_it(tmp_path: Path) -> None:
    write_all(tmp_path, [b"%d\n" % i for i in range(100)])
    reader = SpoolReader(tmp_path)
    reader.acknowledge(50)
    reader.acknowledge(100)
    assert len(read_all(tmp_path)) == 100


def test_lines_freed_already_are_skipped(tmp_path: Path) -> None:
    write_all(tmp_path, [b"%d\n" % i for i in range(1000)], max_bytes=8192 * 10)
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
