"""Where one follower of a job's log stands: every line once, in order, whichever way it comes.

Lines reach a follower twice: from the stored log, which is the truth, and live, as hints that may be missing, late
or doubled. The cursor passes on what follows the last line given out and says when the stored log must be read.
"""

from __future__ import annotations

from dataclasses import dataclass

from libs.common.contracts.messages import LogLine, LogPage


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


def advance_by_history(last: int, page: LogPage, limit: int) -> Advance:
    """Takes a page of the stored log, asked for as "after `last`, at most `limit` lines".

    A hole in stored sequences is real (those lines are lost with their node), so it is passed over.
    """
    fresh = tuple(line for line in page.lines if line.sequence > last)
    reached = fresh[-1].sequence if fresh else last
    more = bool(fresh) and (page.last_sequence > reached or len(page.lines) >= limit)
    return Advance(fresh, reached, behind=more)


def advance_by_tail(last: int, page: LogPage) -> Advance:
    """Takes live lines: only those that follow without a hole; anything after a hole must come from the log."""
    ready: list[LogLine] = []
    reached = last
    for line in sorted(page.lines, key=lambda each: each.sequence):
        if line.sequence == reached + 1:
            ready.append(line)
            reached = line.sequence
    newest = max((line.sequence for line in page.lines), default=page.last_sequence)
    return Advance(tuple(ready), reached, behind=max(newest, page.last_sequence) > reached)
