from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from libs.common.contracts.messages import LogLine, LogPage
from libs.common.loglines import Slice
from services.gateway.domain.log_cursor import advance_by_history, advance_by_tail, skip_to

pytestmark = pytest.mark.unit


def page(*sequences: int, last: int = 0, complete: bool = False) -> LogPage:
    lines = tuple(LogLine(sequence=number, text=f"line {number}") for number in sequences)
    return LogPage(lines=lines, last_sequence=last or max(sequences, default=0), complete=complete)


def numbers(lines: tuple[LogLine, ...]) -> list[int]:
    return [line.sequence for line in lines]


def test_history_gives_only_lines_after_the_last_one() -> None:
    advance = advance_by_history(2, page(1, 2, 3, 4), 1000)
    assert numbers(advance.lines) == [3, 4]
    assert advance.last == 4
    assert not advance.behind


def test_a_full_page_of_history_is_followed_by_another() -> None:
    assert advance_by_history(0, page(1, 2), 2).behind
    assert advance_by_history(0, page(1, 2, last=9), 1000).behind


def test_an_empty_page_of_history_ends_the_reading_whatever_it_says_of_the_last_line() -> None:
    assert not advance_by_history(5, page(last=9), 1000).behind


def test_a_hole_in_the_stored_log_is_passed_over() -> None:
    advance = advance_by_history(0, page(1, 5, 6), 1000)
    assert numbers(advance.lines) == [1, 5, 6]
    assert advance.last == 6


def test_live_lines_that_follow_are_given_at_once() -> None:
    advance = advance_by_tail(3, page(4, 5))
    assert numbers(advance.lines) == [4, 5]
    assert not advance.behind


def test_live_lines_seen_before_are_dropped() -> None:
    advance = advance_by_tail(5, page(4, 5))
    assert advance.lines == ()
    assert not advance.behind


def test_live_lines_after_a_hole_wait_for_the_stored_log() -> None:
    advance = advance_by_tail(3, page(4, 6, 7))
    assert numbers(advance.lines) == [4]
    assert advance.last == 4
    assert advance.behind


def test_live_lines_in_the_wrong_order_are_put_right() -> None:
    assert numbers(advance_by_tail(0, page(2, 1, 3)).lines) == [1, 2, 3]


@pytest.mark.parametrize("seed", range(50))
def test_any_mix_of_lost_doubled_and_shuffled_hints_gives_every_line_once_in_order(seed: int) -> None:
    chance = random.Random(seed)
    stored = list(range(1, 200))
    hints = [stored[at : at + chance.randint(1, 9)] for at in range(0, 199, 4) if chance.random() > 0.3]
    chance.shuffle(hints)
    last, given = 0, []
    for hint in hints:
        advance = advance_by_tail(last, page(*hint))
        given += numbers(advance.lines)
        last = advance.last
        while advance.behind:
            found = page(*stored[last : last + 7], last=199)
            advance = advance_by_history(last, found, 7)
            given += numbers(advance.lines)
            last = advance.last
            if chance.random() < 0.2:
                break
    while last < 199:
        advance = advance_by_history(last, page(*stored[last : last + 50], last=199), 50)
        given += numbers(advance.lines)
        last = advance.last
    assert given == stored


def test_slices_are_lines() -> None:
    stored = Slice.from_lines([LogLine(text="a"), LogLine(text="b")], datetime(2030, 1, 1, tzinfo=UTC)).numbered(4)
    advance = advance_by_history(4, LogPage(slices=(stored.to_message(),), last_sequence=5), 1000)
    assert [(line.sequence, line.text) for line in advance.lines] == [(5, "b")]
    assert advance_by_tail(3, LogPage(slices=(stored.to_message(),), last_sequence=5)).last == 5


@pytest.mark.parametrize(
    ("last", "end", "skip_behind", "reached"),
    [(0, 100, 0, 0), (0, 100, 100, 0), (0, 101, 100, 51), (50, 100, 40, 80), (0, 0, 10, 0)],
)
def test_whoever_would_rather_miss_lines_goes_on_near_the_end(
    last: int, end: int, skip_behind: int, reached: int
) -> None:
    assert skip_to(last, end, skip_behind) == reached
