"""Slices say the same as the lines that they are made of, however they are cut, sent and stored."""

from __future__ import annotations

import zlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.contracts.messages import LogBatch, LogLine, LogSlice
from libs.common.errors import MalformedMessage
from libs.common.loglines import MOST_TEXT_BYTES, Batch, Slice, joined

pytestmark = pytest.mark.unit
NOW = datetime(2030, 1, 1, 2, 3, 4, 567_000, UTC)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=20)
line = st.builds(
    LogLine,
    at=st.just(NOW),
    stream=st.sampled_from(["stdout", "stderr", "nabla"]),
    text=texts,
    attempt=st.integers(0, 3),
    rank=st.integers(0, 3),
    cut=st.booleans(),
)


def numbered(lines: list[LogLine], first: int) -> list[LogLine]:
    return [each.model_copy(update={"sequence": first + index}) for index, each in enumerate(lines)]


@given(st.lists(line, min_size=1, max_size=12), st.integers(1, 2**40))
def test_lines_come_back_as_they_were(lines: list[LogLine], first: int) -> None:
    stored = Slice.from_lines(lines, NOW).numbered(first)
    assert list(stored.lines()) == numbered(lines, first)
    assert Slice.from_message(LogSlice.from_wire(stored.to_message().to_wire())) == stored
    assert Slice.from_bytes(stored.to_bytes()) == stored
    assert stored.last_sequence == first + len(lines) - 1


@given(st.lists(line, min_size=1, max_size=12), st.integers(-1, 13))
def test_what_is_left_without_the_first_lines(lines: list[LogLine], count: int) -> None:
    left = Slice.from_lines(lines, NOW).numbered(7).without(count)
    assert list(left.lines()) == numbered(lines, 7)[max(0, count) :]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 30))
def test_batches_of_many_lines_are_cut_where_lines_are(counts: list[int], skipped: int) -> None:
    batches = tuple(Batch(1_000_000 * index, "stdout", count, cut=True) for index, count in enumerate(counts))
    text = "".join(f"{number}\n" for number in range(sum(counts))).encode()
    whole = Slice(1, batches, text)
    every = list(whole.lines())
    assert [each.text for each in every] == [str(number) for number in range(sum(counts))]
    assert sum(each.cut for each in every) == len(counts)
    assert list(whole.without(skipped).lines()) == every[skipped:]


@given(st.lists(line, min_size=2, max_size=12), st.integers(1, 11))
def test_neighbours_join(lines: list[LogLine], at: int) -> None:
    parts = [Slice.from_lines(some, NOW) for some in (lines[:at], lines[at:]) if some]
    assert list(joined(parts).numbered(1).lines()) == numbered(lines, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        LogSlice(batches=(LogBatch(line_count=2),), text=zlib.compress(b"one\n")),
        LogSlice(batches=(LogBatch(line_count=1),), text=zlib.compress(b"no end")),
        LogSlice(batches=(LogBatch(line_count=-1), LogBatch(line_count=2)), text=zlib.compress(b"one\n")),
        LogSlice(batches=(LogBatch(line_count=1),), text=b"not zlib"),
        LogSlice(batches=(LogBatch(line_count=1),), text=zlib.compress(b"half\n")[:-6]),
        LogSlice(batches=(LogBatch(line_count=1),), text=zlib.compress(b" " * (MOST_TEXT_BYTES + 1) + b"\n")),
    ],
)
def test_what_does_not_belong_together_is_malformed(wrong: LogSlice) -> None:
    with pytest.raises(MalformedMessage):
        Slice.from_message(wrong, NOW)
