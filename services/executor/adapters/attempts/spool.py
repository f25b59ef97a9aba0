"""The log of a running attempt on its node: appended by the shim, read and freed by the node agent.

A segment file holds frames. A frame is one batch of whole lines of one stream that arrived together: a header
(time, stream, number of its first line, how many) and the bytes as the job wrote them. Batches, and not one
record a line, because a job may print 100 MB in a second and the shim is Python: it counts and cuts lines
with calls that run in C, and never touches one. Readers cut frames back into lines.

A line that goes back to its beginning (a carriage return: progress bars) is kept as it looked at last. What is not
ended yet is kept when it stays as it is for a while; until then `unfinished` shows it.

The writer and the reader are two processes that share only the files. Frames carry a checksum, so a torn one
(kill -9 in the middle of a write) is the end of the log and not garbage in it. Nothing is synced while the
job runs: the spool survives every process, not a power cut.
"""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Stream = Literal["o", "e", "n"]  # the last one for the platform's own words

SEGMENT_BYTES = 8 * 1024 * 1024
LINE_LIMIT_BYTES = 64 * 1024  # a longer line is split: also the most that a frame holds

_HEADER = struct.Struct("<HcBIQQII")  # magic, stream, flags, checksum, first line, time in us, lines, bytes
_MAGIC = 0x4E4C
_NO_NEWLINE, _DROPPED = 1, 2
_READ_BYTES = 256 * 1024
_LOOK_AGAIN_US = 100_000
_LOOK_AGAIN_BYTES = 16 << 20
_SUFFIX = ".spool"
# An unfinished line that waits so long is kept as it is: a prompt soon, a progress bar when it stands still.
_PROMPT_US, _STANDSTILL_US = 1_000_000, 10_000_000


class LogLine(NamedTuple):
    """One line. `newline` is False where it was cut or flushed before its end: the next line of the same
    stream goes on with it. `dropped` is how many lines are missing at this place, in a line that says so."""

    number: int
    at_us: int
    stream: Stream
    text: str
    newline: bool = True
    dropped: int = 0


class SpoolBatch(NamedTuple):
    """Consecutive lines of one stream that arrived together; the payload's last newline is missing where it is cut."""

    first_line: int
    at_us: int
    stream: Stream
    line_count: int
    payload: bytes
    cut: bool


@dataclass(slots=True)
class _Unfinished:
    """What a stream has printed since its last newline."""

    text: bytes = b""
    # It went back to its beginning: a progress bar.
    rewritten: bool = False
    since_us: int = 0
    touched_us: int = 0

    @property
    def due_us(self) -> int:
        return self.touched_us + _STANDSTILL_US if self.rewritten else self.since_us + _PROMPT_US


class SpoolWriter:
    """Appends what a job prints. Never blocks and never raises: what has no room is counted, and the log says so.

    Args:
        log_limit_bytes: of the whole log; past it the log ends.
        reserve_bytes: so much of the disk stays free for others (a tenth of a small disk); below it the log pauses.
    """

    def __init__(
        self, directory: Path, log_limit_bytes: int, reserve_bytes: int = 0, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self._directory = directory
        self._log_limit_bytes = log_limit_bytes
        self._reserve_bytes = reserve_bytes
        self._segment_limit = segment_bytes
        self._unfinished: dict[Stream, _Unfinished] = {"o": _Unfinished(), "e": _Unfinished()}
        self._segment = -1
        self._segment_bytes = 0
        self._kept_bytes = 0
        self._next_line = 0
        self._dropped = 0
        self._over = False
        self._paused = False
        self._look_at_us = 0
        self._look_at_bytes = 0

    @property
    def settle_at_us(self) -> int | None:
        """When `settle` has something to do; None as long as every line is ended."""
        due = [each.due_us for each in self._unfinished.values() if each.text]
        return min(due, default=None)

    def unfinished(self) -> dict[str, str]:
        """What is on lines that are not ended yet, as it looks now."""
        waiting = ((stream, each.text) for stream, each in self._unfinished.items())
        return {stream: text.rstrip(b"\r").decode("utf-8", "replace") for stream, text in waiting if text}

    def write(self, stream: Stream, data: bytes, at_us: int) -> None:
        line = self._unfinished[stream]
        text = line.text + data if line.text else data
        if b"\r" in text:
            text, rewritten = _as_it_looks(text)
        else:
            rewritten = False
        start = 0
        while (end := _end_of_lines(text, start)) > start:
            self._append(stream, text[start:end], at_us)
            start = end
        if start or not line.text:
            line.since_us, line.rewritten = at_us, False
        line.text, line.touched_us = text[start:], at_us
        line.rewritten = line.rewritten or rewritten

    def settle(self, at_us: int) -> None:
        """Keep unfinished lines that have stood still for long enough, so that prompts are seen."""
        for stream, line in self._unfinished.items():
            if line.text and line.due_us <= at_us:
                self._keep_unfinished(stream, line, at_us)

    def flush(self, at_us: int) -> None:
        """Keep all unfinished lines as they are."""
        for stream, line in self._unfinished.items():
            if line.text:
                self._keep_unfinished(stream, line, at_us)

    def close(self, at_us: int) -> None:
        """Flush, say what is missing even where the bound is reached, and sync what was written last."""
        self.flush(at_us)
        if self._dropped:
            self._write_mark(at_us)
        if self._segment >= 0:
            with suppress(OSError):
                os.fsync(self._segment)
            os.close(self._segment)
            self._segment = -1

    def _keep_unfinished(self, stream: Stream, line: _Unfinished, at_us: int) -> None:
        self._append(stream, line.text.rstrip(b"\r") or b" ", at_us)
        line.text, line.rewritten = b"", False

    def _append(self, stream: Stream, payload: bytes, at_us: int) -> None:
        lines = payload.count(b"\n")
        unfinished = not payload.endswith(b"\n")
        lines += unfinished
        if not self._has_room(_HEADER.size + len(payload), at_us):
            self._dropped += lines
            return
        if self._dropped:
            self._write_mark(at_us)
        if not self._write_frame(stream, _NO_NEWLINE if unfinished else 0, at_us, lines, payload):
            # One long gap is better than many short ones, for whose marks there would be room.
            self._dropped += lines
            self._paused, self._look_at_us = True, at_us + _LOOK_AGAIN_US

    def _write_mark(self, at_us: int) -> None:
        if self._write_frame("n", _DROPPED, at_us, 1, b"%d" % self._dropped):
            self._dropped = 0

    def _write_frame(self, stream: Stream, flags: int, at_us: int, lines: int, payload: bytes) -> bool:
        """Append one frame; False when the disk refuses, and then no half of it stays behind."""
        frame = _Frame(stream, flags, self._next_line, at_us, lines, payload)
        size = _HEADER.size + len(payload)
        try:
            self._open_segment_for(size)
            if os.writev(self._segment, [frame.header(), payload]) != size:
                raise OSError("short write")
        except OSError:
            if self._segment >= 0:
                os.ftruncate(self._segment, self._segment_bytes)
            return False
        self._segment_bytes += size
        self._kept_bytes += size
        self._next_line += lines
        return True

    def _open_segment_for(self, size: int) -> None:
        if self._segment >= 0:
            if self._segment_bytes + size <= self._segment_limit or self._segment_bytes == 0:
                return
            os.close(self._segment)
            self._segment = -1
            self._segment_bytes = 0
        path = self._directory / f"{self._next_line:020d}{_SUFFIX}"
        self._segment = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _has_room(self, size: int, at_us: int) -> bool:
        if self._over:
            return False
        if self._kept_bytes + size > self._log_limit_bytes:
            self._over = True
            self._say(f"the log's limit of {self._log_limit_bytes:,} bytes is reached; what follows is not kept", at_us)
            return False
        if at_us >= self._look_at_us or self._kept_bytes >= self._look_at_bytes:
            self._look_at_us, self._look_at_bytes = at_us + _LOOK_AGAIN_US, self._kept_bytes + _LOOK_AGAIN_BYTES
            self._look_at_disk(at_us)
        return not self._paused

    def _look_at_disk(self, at_us: int) -> None:
        """Pauses where the disk is nearly full, and goes on when clearly more than the reserve is free again."""
        disk = os.statvfs(self._directory)
        reserve = min(self._reserve_bytes, disk.f_blocks * disk.f_frsize // 10)
        free = disk.f_bavail * disk.f_frsize
        if self._paused:
            self._paused = free < reserve * 5 // 4
        elif free < reserve:
            self._paused = True
            self._say("the node's disk is nearly full; until there is room again nothing more is kept", at_us)

    def _say(self, text: str, at_us: int) -> None:
        self._write_frame("n", 0, at_us, 1, f"[nabla] {text}\n".encode())


class SpoolReader:
    """Reads a spool, whether or not its writer still lives. Several readers may look; one acknowledges."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._place: _Place | None = None

    def read_from(self, line_number: int, max_lines: int = 10_000, max_bytes: int = 1024 * 1024) -> list[LogLine]:
        """Lines from `line_number` on, or from the oldest that is left; empty at the present end.

        Going on where the last call ended costs no search. At least one line comes, however long, if there is
        one; otherwise neither bound is passed.
        """
        found: list[LogLine] = []
        room = max_bytes
        for place, frame in self._frames_from(line_number):
            self._place = place
            for line, size in frame.lines_from(line_number):
                if found and (len(found) >= max_lines or size > room):
                    return found
                found.append(line)
                room -= size
        return found

    def batches_from(self, line_number: int, max_lines: int, max_bytes: int) -> list[SpoolBatch]:
        """The same as batches, for whoever passes lines on without a look at each."""
        found: list[SpoolBatch] = []
        room_lines, room_bytes = max_lines, max_bytes
        for place, frame in self._frames_from(line_number):
            self._place = place
            if found and (room_lines <= 0 or len(frame.payload) > room_bytes):
                break
            batch = frame.batch_from(line_number, room_lines)
            found.append(batch)
            room_lines -= batch.line_count
            room_bytes -= len(batch.payload)
            if room_lines <= 0:
                break
        return found

    def acknowledge(self, line_number: int) -> None:
        """Every line below `line_number` is safe elsewhere: delete the segments that hold no other."""
        segments = _segments(self._directory)
        for path, following in itertools.pairwise(segments):
            if _first_line(following) <= line_number:
                path.unlink(missing_ok=True)

    def _frames_from(self, line_number: int) -> Iterator[tuple[_Place, _Frame]]:
        """Frames that end behind `line_number`, with where each lies."""
        place = self._find(line_number)
        while place is not None:
            following = self._segment_after(place.segment)  # before reading: only then is its end known as final
            for offset, frame in _frames(self._directory / place.segment, place.offset):
                if frame.end_line > line_number:
                    yield _Place(place.segment, offset, frame.first_line), frame
            place = following

    def _find(self, line_number: int) -> _Place | None:
        known = self._place
        if known and known.first_line <= line_number and (self._directory / known.segment).exists():
            return known
        segments = _segments(self._directory)
        if not segments:
            return None
        start = next((path for path in reversed(segments) if _first_line(path) <= line_number), segments[0])
        return _Place(start.name, 0, _first_line(start))

    def _segment_after(self, name: str) -> _Place | None:
        later = [path for path in _segments(self._directory) if path.name > name]
        return _Place(later[0].name, 0, _first_line(later[0])) if later else None


class _Place(NamedTuple):
    segment: str
    offset: int
    first_line: int


@dataclass(frozen=True, slots=True)
class _Frame:
    stream: Stream
    flags: int
    first_line: int
    at_us: int
    line_count: int
    payload: bytes

    @property
    def end_line(self) -> int:
        return self.first_line + self.line_count

    def header(self) -> bytes:
        """With a checksum over itself and the payload."""
        return self._packed(zlib.crc32(self.payload, zlib.crc32(self._packed(0))))

    def _packed(self, checksum: int) -> bytes:
        counts = (self.first_line, self.at_us, self.line_count, len(self.payload))
        return _HEADER.pack(_MAGIC, self.stream.encode(), self.flags, checksum, *counts)

    def lines_from(self, line_number: int) -> Iterator[tuple[LogLine, int]]:
        """The lines at and behind a number, each with its size in bytes."""
        if self.flags & _DROPPED:
            yield self._mark(), len(self.payload)
            return
        pieces = self.payload.split(b"\n")[: self.line_count]
        cut = self.end_line - 1 if self.flags & _NO_NEWLINE else None
        for number in range(max(line_number, self.first_line), self.end_line):
            piece = pieces[number - self.first_line]
            text = piece.decode("utf-8", "replace")
            yield LogLine(number, self.at_us, self.stream, text, newline=number != cut), len(piece)

    def batch_from(self, line_number: int, max_lines: int) -> SpoolBatch:
        """The lines at and behind a number, at most so many."""
        if self.flags & _DROPPED:
            text = self._mark().text.encode()
            return SpoolBatch(self.first_line, self.at_us, self.stream, 1, text + b"\n", cut=False)
        payload, first = self.payload, max(line_number, self.first_line)
        count = self.end_line - first
        cut = bool(self.flags & _NO_NEWLINE)
        if first > self.first_line:
            payload = payload.split(b"\n", first - self.first_line)[-1]
        if count > max_lines:
            payload = b"\n".join(payload.split(b"\n", max_lines)[:max_lines]) + b"\n"
            count, cut = max_lines, False
        return SpoolBatch(first, self.at_us, self.stream, count, payload, cut)

    def _mark(self) -> LogLine:
        missing = int(self.payload)
        text = (
            f"[nabla] {missing:,} {'line is' if missing == 1 else 'lines are'} missing here: there was no room for more"
        )
        return LogLine(self.first_line, self.at_us, self.stream, text, dropped=missing)


def _as_it_looks(text: bytes) -> tuple[bytes, bool]:
    """The text with each line as it looks once its carriage returns are heeded; whether the last one, which is not
    ended, has any.

    What was printed last counts, also where it is shorter: whoever draws a bar covers the old one.
    """
    *lines, last = text.split(b"\n")
    rewritten = b"\r" in last
    lines = [_last_state(line) if b"\r" in line else line for line in lines]
    if rewritten:
        # Its own end is kept: what comes next begins at the line's beginning.
        bare = last.rstrip(b"\r")
        last = bare.rpartition(b"\r")[2] + (b"\r" if len(bare) < len(last) else b"")
    return b"\n".join([*lines, last]), rewritten


def _last_state(line: bytes) -> bytes:
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _end_of_lines(text: bytes, start: int) -> int:
    """Where a frame that begins at `start` ends: behind a newline, or inside a line too long to wait for."""
    limit = start + LINE_LIMIT_BYTES
    end = text.rfind(b"\n", start, limit) + 1
    if end:
        return end
    return _character_boundary(text, limit) if len(text) > limit else start


def _character_boundary(text: bytes, position: int) -> int:
    """At most three bytes back, so that no UTF-8 character is cut; `position` where the text is not UTF-8."""
    for boundary in range(position, position - 4, -1):
        if text[boundary] & 0xC0 != 0x80:
            return boundary
    return position


def _frames(path: Path, offset: int) -> Iterator[tuple[int, _Frame]]:
    """Whole frames of a segment from an offset; ends before one that is torn or still being written."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # acknowledged meanwhile
        return
    try:
        while batch := os.pread(descriptor, _READ_BYTES, offset):
            used = 0
            while (frame := _parse(batch, used)) is not None:
                yield offset + used, frame
                used += _HEADER.size + len(frame.payload)
            if not used:
                return
            offset += used
    finally:
        os.close(descriptor)


def _parse(batch: bytes, start: int) -> _Frame | None:
    """The frame at `start`; None where it is torn or goes on behind the batch."""
    header = batch[start : start + _HEADER.size]
    if len(header) < _HEADER.size:
        return None
    _, kind, flags, _, first_line, at_us, lines, size = _HEADER.unpack(header)
    payload = batch[start + _HEADER.size : start + _HEADER.size + size]
    stream: Stream = "o" if kind == b"o" else "n" if kind == b"n" else "e"
    frame = _Frame(stream, flags, first_line, at_us, lines, payload)
    return frame if frame.header() == header else None


def _segments(directory: Path) -> list[Path]:
    return [directory / name for name in sorted(os.listdir(directory)) if name.endswith(_SUFFIX)]


def _first_line(segment: Path) -> int:
    return int(segment.name.removesuffix(_SUFFIX))
