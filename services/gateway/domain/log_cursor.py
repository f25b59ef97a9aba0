"""Where one follower of a job's log stands: every line once, in order, whichever way it comes.

Lines reach a follower twice: from the stored log, which is the truth, and live, as hints that may be missing, late
or doubled. The cursor passes on what follows the last line given out and says when the stored log must be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from libs.common.contracts.messages import LogLine, LogPage
from libs.common.loglines import Slice


@dataclass(frozen=True, slots=True)
class Advance:
    """What one page added.

    Args:
        lines: to be given out now, in order.
        last: the sequence of the last line given out.
        behind: the log has lines after `last` that must be read from it.
    """

    lines: tuple[LogLine, ...]
    last: int
    behind: bool


def lines_of(page: LogPage) -> tuple[LogLine, ...]:
    """The page's lines, whichever way it says them.

    Raises:
        MalformedMessage: a slice's text is not the lines that it says.
    """
    return (*page.lines, *(line for each in page.slices for line in Slice.from_message(each).lines()))


def skip_to(last: int, last_sequence: int, skip_behind: int) -> int:
    """Where a follower goes on who would rather miss lines than the present; `last` where it need not miss any.

    Args:
        skip_behind: so many lines behind the end are too many; 0 for whoever wants every line.
    """
    return last_sequence - skip_behind // 2 if 0 < skip_behind < last_sequence - last else last


def skipped_mark(last: int, reached: int, now: datetime) -> LogLine:
    """The line that stands for those that were skipped; under the number of the last one, so that resuming works."""
    text = f"[{reached - last:,} lines were skipped to keep up; the stored log has them]"
    return LogLine(sequence=reached, at=now, stream="nabla", text=text)


def advance_by_history(last: int, page: LogPage, limit: int) -> Advance:
    """Takes a page of the stored log, asked for as "after `last`, at most `limit` lines".

    A hole in stored sequences is real (those lines are lost with their node), so it is passed over.
    """
    lines = lines_of(page)
    fresh = tuple(line for line in lines if line.sequence > last)
    reached = fresh[-1].sequence if fresh else last
    more = bool(fresh) and (page.last_sequence > reached or len(lines) >= limit)
    return Advance(fresh, reached, behind=more)


def advance_by_tail(last: int, page: LogPage) -> Advance:
    """Takes live lines: only those that follow without a hole; anything after a hole must come from the log."""
    ready: list[LogLine] = []
    reached = last
    lines = lines_of(page)
    for line in sorted(lines, key=lambda each: each.sequence):
        if line.sequence == reached + 1:
            ready.append(line)
            reached = line.sequence
    newest = max((line.sequence for line in lines), default=page.last_sequence)
    return Advance(tuple(ready), reached, behind=max(newest, page.last_sequence) > reached)
