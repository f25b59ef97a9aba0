"""Logs: how lines of many attempts and ranks become one sequence, and when the log of a job is whole.

| from | driven by | to |
|---|---|---|
| live | end: the job is terminal | ended |
| ended | seal: nothing more is awaited and every line is in a block | sealed |
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from libs.common.clock import to_us
from libs.common.contracts.messages import LogFrame, LogLine, LogSlice
from libs.common.loglines import Batch, Slice, joined
from libs.common.transitions import TransitionTable

LIVE, ENDED, SEALED = "live", "ended", "sealed"
LOG = TransitionTable("log", {(LIVE, "end"): ENDED, (ENDED, "seal"): SEALED}, terminal=frozenset({SEALED}))

# The states of a job after which nothing more happens to it.
OVER = frozenset({"succeeded", "failed", "cancelled", "timed_out"})
BLOCK_BYTES = 256 * 1024
PAGE_BYTES = 900_000
# What a line and a batch take in an answer beside their text.
LINE_ROOM_BYTES, BATCH_ROOM_BYTES = 180, 130
# Six compresses a log by a tenth more, and takes three times as long.
GZIP_LEVEL = 3
DEFAULT_LIMIT = 1_000
MAX_LIMIT = 10_000
# The platform's own words among a job's lines.
PLATFORM_STREAM = "nabla"
_quoted = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Block:
    """Lines first..last of a job as one gzip member, at these bytes of an object: a line of JSON that says when each
    came and from where, then the lines."""

    first_sequence: int
    last_sequence: int
    offset: int
    length: int


def lines_of(frame: LogFrame, now: datetime) -> Slice:
    """All of the frame's lines, as its attempt's and rank's.

    Raises:
        MalformedMessage: the frame's text is not the lines that it says.
    """
    parts = [Slice.from_lines(frame.lines, now)] if frame.lines else []
    if frame.slice.batches:
        parts.append(Slice.from_message(frame.slice, now))
    return joined(parts).of(frame.attempt, frame.rank) if parts else Slice(0, (), b"")


def is_early(next_line: int, frame: LogFrame) -> bool:
    """Whether lines before this frame have not come yet."""
    return frame.first_line > next_line


def lost_mark(frame: LogFrame, next_line: int, now: datetime) -> Slice:
    """The line that stands where lines are missing before `frame`."""
    count = frame.first_line - next_line
    words = "1 line was" if count == 1 else f"{count} lines were"
    mark = LogLine(at=now, stream=PLATFORM_STREAM, text=f"[{words} lost on the way to storage]")
    return Slice.from_lines([mark], now).of(frame.attempt, frame.rank)


def lost_lines(first_sequence: int, last_sequence: int, now: datetime) -> Slice:
    """What stands in the place of lines that the object store has lost: as many, so that all others keep theirs."""
    count = last_sequence - first_sequence + 1
    words = f"[{'1 line was' if count == 1 else f'{count} lines were'} lost by the object store]"
    text = f"{words}\n".encode() + b"\n" * (count - 1)
    return Slice(first_sequence, (Batch(to_us(now), PLATFORM_STREAM, count),), text)


def nothing_awaited(rank_counts: Mapping[str, int], closed_by_source: Iterable[tuple[str, bool]]) -> bool:
    """Whether each started attempt has said its last line, on each of its ranks.

    Args:
        rank_counts: how many ranks each attempt has.
        closed_by_source: (attempt id, its `last` frame came) of each attempt and rank that was heard.
    """
    closed: Counter[str] = Counter()
    for attempt_id, last in closed_by_source:
        if not last:
            return False
        closed[attempt_id] += 1
    return all(closed[attempt_id] >= count for attempt_id, count in rank_counts.items())


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
    """Collects consecutive lines up to a limit and to what fits an answer.

    Args:
        sliced: as slices, of which the last may go past the limit.
    """

    def __init__(self, after: int, limit: int, *, sliced: bool = False) -> None:
        self.lines: list[LogLine] = []
        self.slices: list[LogSlice] = []
        self.position = after
        self.full = False
        self._sliced = sliced
        self._room_lines = min(limit, MAX_LIMIT) if limit > 0 else DEFAULT_LIMIT
        self._room_bytes = PAGE_BYTES

    def add(self, stored: Slice) -> None:
        """Takes the lines that follow `position`, as far as there is room; something always fits."""
        fresh = stored.without(self.position + 1 - stored.first_sequence)
        if not fresh.batches or fresh.first_sequence != self.position + 1:
            return
        if self._sliced:
            self._add_slice(fresh)
        else:
            self._add_lines(fresh)

    def _add_slice(self, fresh: Slice) -> None:
        message = fresh.to_message()
        self._room_bytes -= len(message.text) * 4 // 3 + BATCH_ROOM_BYTES * len(message.batches)
        if self.slices and self._room_bytes < 0:
            self.full = True
            return
        self.slices.append(message)
        self.position = fresh.last_sequence
        self._room_lines -= fresh.line_count
        self.full = self._room_lines <= 0

    def _add_lines(self, fresh: Slice) -> None:
        for line in fresh.lines():
            self._room_bytes -= len(_quoted(line.text).encode()) + LINE_ROOM_BYTES
            if self.lines and self._room_bytes < 0:
                self.full = True
                return
            self.lines.append(line)
            self.position = line.sequence
            if len(self.lines) >= self._room_lines:
                self.full = True
                return


def packed_chunk(lines: Slice) -> bytes:
    """Lines as they wait in the database until the log is compacted."""
    return zlib.compress(lines.to_bytes(), 1)


def unpacked_chunk(body: bytes) -> Slice:
    return Slice.from_bytes(zlib.decompress(body))


def packed_blocks(chunks: Iterable[Slice]) -> tuple[bytes, tuple[Block, ...]]:
    """The lines as consecutive gzip members, together one valid gzip file, and where each begins.

    The same chunks give the same bytes, so writing them again after a crash changes nothing.
    """
    body = bytearray()
    blocks = []
    for lines in _groups(chunks):
        member = gzip.compress(lines.to_bytes(), GZIP_LEVEL, mtime=0)
        blocks.append(Block(lines.first_sequence, lines.last_sequence, len(body), len(member)))
        body += member
    return bytes(body), tuple(blocks)


def _groups(chunks: Iterable[Slice]) -> Iterator[Slice]:
    group: list[Slice] = []
    size = 0
    for chunk in chunks:
        group.append(chunk)
        size += len(chunk.text) + LINE_ROOM_BYTES * len(chunk.batches)
        if size >= BLOCK_BYTES:
            yield joined(group)
            group, size = [], 0
    if group:
        yield joined(group)


def unpacked_block(body: bytes) -> Slice:
    return Slice.from_bytes(gzip.decompress(body))
