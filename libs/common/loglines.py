"""Many lines of a log at once: a text, and which of its lines came when and from where.

A job may print 100,000 lines in a second, and everything between its node and the object store is Python. So lines
travel, wait and are stored as slices, whose text is cut by calls that run in C, and only whoever shows lines to a
person makes an object of each.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from libs.common.clock import from_us, to_us
from libs.common.contracts.messages import LogBatch, LogLine, LogSlice
from libs.common.errors import MalformedMessage

# A slice with more text than this is nobody's who means well: it would unpack into all memory there is.
MOST_TEXT_BYTES = 4 << 20
_LEVEL = 1


class Batch(NamedTuple):
    """Consecutive lines of one stream that arrived together. `cut`: the last one goes on in the stream's next line."""

    at_us: int
    stream: str
    line_count: int
    attempt: int = 0
    rank: int = 0
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """Lines from `first_sequence` on; `text` is UTF-8 and ends each of them with a newline."""

    first_sequence: int
    batches: tuple[Batch, ...]
    text: bytes

    @property
    def line_count(self) -> int:
        return sum(batch.line_count for batch in self.batches)

    @property
    def last_sequence(self) -> int:
        return self.first_sequence + self.line_count - 1

    def lines(self) -> Iterator[LogLine]:
        """Each line as an object. The text is the platform's own by now, and not checked again."""
        texts = self.text.decode("utf-8", "replace").split("\n")
        number = 0
        for at_us, stream, line_count, attempt, rank, cut in self.batches:
            at, last = from_us(at_us), number + line_count - 1
            for index in range(number, number + line_count):
                yield LogLine.model_construct(
                    sequence=self.first_sequence + index,
                    at=at,
                    stream=stream,
                    text=texts[index],
                    attempt=attempt,
                    rank=rank,
                    cut=cut and index == last,
                )
            number += line_count

    def without(self, count: int) -> Slice:
        """What is left when the first `count` lines are taken away."""
        if count <= 0:
            return self
        batches: list[Batch] = []
        skip = count
        for batch in self.batches:
            left = max(0, batch.line_count - skip)
            skip = max(0, skip - batch.line_count)
            if left:
                batches.append(batch._replace(line_count=left))
        pieces = self.text.split(b"\n", count)
        return Slice(self.first_sequence + count, tuple(batches), pieces[count] if len(pieces) > count else b"")

    def numbered(self, first_sequence: int) -> Slice:
        return Slice(first_sequence, self.batches, self.text)

    def of(self, attempt: int, rank: int) -> Slice:
        """The same lines, as this attempt's and rank's."""
        batches = tuple(batch._replace(attempt=attempt, rank=rank) for batch in self.batches)
        return Slice(self.first_sequence, batches, self.text)

    def to_message(self) -> LogSlice:
        return LogSlice.model_construct(
            first_sequence=self.first_sequence,
            batches=tuple(
                LogBatch.model_construct(
                    at=from_us(each.at_us),
                    stream=each.stream,
                    line_count=each.line_count,
                    attempt=each.attempt,
                    rank=each.rank,
                    cut=each.cut,
                )
                for each in self.batches
            ),
            text=zlib.compress(self.text, _LEVEL),
            size_bytes=len(self.text),
        )

    @classmethod
    def from_message(cls, message: LogSlice, now: datetime | None = None) -> Slice:
        """Raises MalformedMessage where text and batches do not belong together."""
        late = to_us(now) if now else 0
        batches = tuple(
            Batch(to_us(each.at) if each.at else late, each.stream, each.line_count, each.attempt, each.rank, each.cut)
            for each in message.batches
        )
        return _checked(cls(message.first_sequence, batches, _unpacked(message.text)))

    @classmethod
    def from_lines(cls, lines: Iterable[LogLine], now: datetime) -> Slice:
        """Lines that have an object each already; their sequences follow each other."""
        given = tuple(lines)
        batches = tuple(
            Batch(to_us(line.at or now), line.stream, 1, line.attempt, line.rank, line.cut) for line in given
        )
        text = "".join(line.text.replace("\n", " ") + "\n" for line in given)
        return cls(given[0].sequence if given else 0, batches, text.encode("utf-8", "replace"))

    def to_bytes(self) -> bytes:
        """As it is stored: one line of JSON, then the text. The same slice gives the same bytes."""
        return json.dumps([self.first_sequence, len(self.text), self.batches], separators=(",", ":")).encode() + (
            b"\n" + self.text
        )

    @classmethod
    def from_bytes(cls, body: bytes) -> Slice:
        head, _, rest = body.partition(b"\n")
        first, size, batches = json.loads(head)
        return cls(first, tuple(Batch(*batch) for batch in batches), rest[:size])


def joined(slices: Iterable[Slice]) -> Slice:
    """One slice out of several that follow each other."""
    all_of_them = tuple(slices)
    batches = tuple(batch for each in all_of_them for batch in each.batches)
    return Slice(all_of_them[0].first_sequence, batches, b"".join(each.text for each in all_of_them))


def _unpacked(body: bytes) -> bytes:
    if not body:
        return b""
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(body, MOST_TEXT_BYTES)
    except zlib.error:
        raise MalformedMessage("LogSlice", ("text",)) from None
    if not unpacking.eof:
        raise MalformedMessage("LogSlice", ("text",))
    return text


def _checked(one: Slice) -> Slice:
    ends = not one.text or one.text.endswith(b"\n")
    if any(batch.line_count <= 0 for batch in one.batches) or not ends or one.text.count(b"\n") != one.line_count:
        raise MalformedMessage("LogSlice", ("batches", "text"))
    return one
