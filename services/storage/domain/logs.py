"""Logs: how lines of many attempts and ranks become one sequence, and when the log of a job is whole.

| from | driven by | to |
|---|---|---|
| live | end: the job is terminal | ended |
| ended | seal: nothing more is awaited and every line is in a block | sealed |
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from libs.common.contracts.messages import LogFrame, LogLine, LogPage
from libs.common.transitions import TransitionTable

LIVE, ENDED, SEALED = "live", "ended", "sealed"
LOG = TransitionTable("log", {(LIVE, "end"): ENDED, (ENDED, "seal"): SEALED}, terminal=frozenset({SEALED}))

# The states of a job after which nothing more happens to it.
OVER = frozenset({"succeeded", "failed", "cancelled", "timed_out"})
MAX_LINE_BYTES = 64 * 1024
BLOCK_BYTES = 256 * 1024
PAGE_BYTES = 900_000
DEFAULT_LIMIT = 1_000
MAX_LIMIT = 10_000
# The platform's own words among a job's lines.
PLATFORM_STREAM = "nabla"


@dataclass(frozen=True, slots=True)
class Block:
    """Lines first..last of a job as one gzip member of JSON lines, at these bytes of an object."""

    first_sequence: int
    last_sequence: int
    offset: int
    length: int


def is_early(next_line: int, frame: LogFrame) -> bool:
    """Whether lines before this frame have not come yet."""
    return frame.first_line > next_line


def new_lines(next_line: int, frame: LogFrame) -> tuple[LogLine, ...]:
    """The lines of the frame that did not come before, when it is not early."""
    return frame.lines[next_line - frame.first_line :]


def numbered(lines: Iterable[LogLine], frame: LogFrame, last_sequence: int, now: datetime) -> tuple[LogLine, ...]:
    """The lines with their place in the job's log, after `last_sequence`."""
    return tuple(
        LogLine.model_construct(
            sequence=sequence,
            at=line.at or now,
            stream=line.stream,
            text=clipped(line.text),
            attempt=frame.attempt,
            rank=frame.rank,
        )
        for sequence, line in enumerate(lines, last_sequence + 1)
    )


def clipped(text: str) -> str:
    """The text, or as much as a line may have and how much was cut off."""
    if len(text) * 4 <= MAX_LINE_BYTES:
        return text
    data = text.encode()
    if len(data) <= MAX_LINE_BYTES:
        return text
    kept = data[: MAX_LINE_BYTES - 64].decode(errors="ignore")
    return f"{kept} [{len(data) - len(kept.encode())} bytes cut]"


def lost_mark(frame: LogFrame, next_line: int, now: datetime) -> LogLine:
    """The line that stands where lines are missing before `frame`."""
    count = frame.first_line - next_line
    words = "1 line was" if count == 1 else f"{count} lines were"
    return LogLine(at=now, stream=PLATFORM_STREAM, text=f"[{words} lost on the way to storage]")


def lost_lines(first_sequence: int, last_sequence: int, now: datetime) -> list[LogLine]:
    """What stands in the place of lines that the object store has lost: as many, so that all others keep theirs."""
    count = last_sequence - first_sequence + 1
    words = f"[{'1 line was' if count == 1 else f'{count} lines were'} lost by the object store]"
    numbers = range(first_sequence, last_sequence + 1)
    return [
        LogLine(sequence=number, at=now, stream=PLATFORM_STREAM, text=words if number == first_sequence else "")
        for number in numbers
    ]


def nothing_awaited(attempts: Iterable[str], closed_by_source: Iterable[tuple[str, bool]]) -> bool:
    """Whether each started attempt has said its last line, on each rank that was heard.

    Args:
        closed_by_source: (attempt id, its `last` frame came) of each attempt and rank.
    """
    closed: dict[str, bool] = {}
    for attempt_id, last in closed_by_source:
        closed[attempt_id] = closed.get(attempt_id, True) and last
    return all(closed.values()) and all(attempt in closed for attempt in attempts)


@dataclass(slots=True)
class Intake:
    """For how long in a row the bus has answered and we had settled all that it held for us.

    Patience by the clock alone would give up on lines that wait in the bus because we, or it, were away.

    Args:
        unseen: after so long without a look nothing is known of the time before.
    """

    unseen: timedelta
    _since: datetime | None = None
    _until: datetime | None = None
    _looked_at: datetime | None = None
    # When which frame was the newest: once that is settled, so is all that the bus held at that moment.
    _goal: tuple[datetime, int] | None = None

    def note(self, now: datetime, newest: int, settled: int) -> None:
        """Takes down a look: the number of the bus's newest frame, and up to which one all are settled."""
        if self._looked_at is None or now - self._looked_at > self.unseen:
            self._since, self._until, self._goal = now, None, None
        self._looked_at = now
        if self._goal and settled >= self._goal[1]:
            self._until, self._goal = self._goal[0], None
        if settled >= newest:
            self._until = now
        elif self._goal is None:
            self._goal = now, newest

    def settled_s(self, after: datetime) -> float:
        """Of the time after that moment, how much we have heard out."""
        if self._since is None or self._until is None:
            return 0.0
        return (self._until - max(after, self._since)).total_seconds()


def start_after(after: int, last_sequence: int) -> int:
    """The sequence after which a page begins; a negative `after` means that many lines from the end."""
    return max(0, last_sequence + after) if after < 0 else after


class PageCutter:
    """Collects consecutive lines up to a limit and to what fits an answer."""

    def __init__(self, after: int, limit: int) -> None:
        self.lines: list[LogLine] = []
        self.position = after
        self.full = False
        self._room_lines = min(limit, MAX_LIMIT) if limit > 0 else DEFAULT_LIMIT
        self._room_bytes = PAGE_BYTES

    def add(self, lines: Iterable[LogLine]) -> None:
        """Takes the lines that follow `position`, as far as there is room; at least one always fits."""
        for line in lines:
            if line.sequence != self.position + 1:
                continue
            self._room_bytes -= len(line.to_wire()) + 1
            if self.lines and self._room_bytes < 0:
                self.full = True
                return
            self.lines.append(line)
            self.position = line.sequence
            if len(self.lines) >= self._room_lines:
                self.full = True
                return


def packed_chunk(page: bytes) -> bytes:
    """A page as it waits in the database until the log is compacted."""
    return zlib.compress(page, 1)


def unpacked_chunk(body: bytes) -> tuple[LogLine, ...]:
    return LogPage.from_wire(zlib.decompress(body)).lines


def packed_blocks(lines: Sequence[LogLine]) -> tuple[bytes, tuple[Block, ...]]:
    """The lines as consecutive gzip members, together one valid gzip file, and where each begins.

    The same lines give the same bytes, so writing them again after a crash changes nothing.
    """
    body = bytearray()
    blocks = []
    for group in _groups(lines):
        member = gzip.compress(b"".join(line.to_wire() + b"\n" for line in group), 6, mtime=0)
        blocks.append(Block(group[0].sequence, group[-1].sequence, len(body), len(member)))
        body += member
    return bytes(body), tuple(blocks)


def _groups(lines: Sequence[LogLine]) -> Iterator[list[LogLine]]:
    group: list[LogLine] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line.text) + 100
        if size >= BLOCK_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def unpacked_block(body: bytes) -> tuple[LogLine, ...]:
    return tuple(LogLine.from_wire(line) for line in gzip.decompress(body).splitlines())
