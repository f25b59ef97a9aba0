"""Ships the log of one attempt to the bus, each line once and in order, whatever dies in between.

The spool is the buffer: as long as the bus, or storage behind it, does not take a frame, lines wait on the node.

A line's number counts the platform's own words and the job's lines together, in the order in which they are sent.
Before a frame leaves, its composition (so many words, so many lines of the spool) is written down; whoever comes
after a crash sends exactly that frame again, under the same id, so JetStream stores it once.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

from libs.common.clock import to_us, utc_now
from libs.common.contracts.messages import LogFrame, LogLine, LogPage
from libs.common.loglines import Batch, Slice
from libs.common.waiting import happens
from services.executor.adapters.attempts import spool
from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.adapters.attempts.masking import Masker

BATCH_S = 0.05
FRAME_LINES = 20_000
FRAME_BYTES = 512 * 1024
# As many moments of arrival: each takes room of its own, which no compression makes small.
FRAME_BATCHES = 600
# A frame that is half full leaves at once; others wait for company.
HASTE_BYTES = 64 * 1024
# Beneath the stream's limit of 256 KB, which counts headers too.
BODY_BYTES = 230 * 1024
LOOK_S = 2.0
# The whole log of an attempt, however it is read, cannot hold these.
_CONTROLS = {code: "\ufffd" for code in range(32) if chr(code) not in "\t\n\r\x1b"}
_CONTROL_BYTES = bytes(_CONTROLS)
_STREAMS = {"o": "stdout", "e": "stderr", "n": "nabla"}

log = logging.getLogger(__name__)
Send = Callable[[int, bytes], Awaitable[None]]
Show = Callable[[LogPage], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Identity:
    job_id: str
    attempt_id: str
    number: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Word:
    """A line of the platform's own. `tail`: it comes after all that the job printed."""

    key: str
    at_us: int
    text: str
    tail: bool


@dataclass(frozen=True, slots=True)
class Place:
    """What is stored (`line`, `word`, `spool` are the next ones) and the frame that is on its way."""

    line: int = 0
    word: int = 0
    spool: int = 0
    words: int = 0
    lines: int = 0
    last: bool = False
    whole: bool = False

    def after(self) -> Place:
        return Place(
            self.line + self.words + self.lines,
            self.word + self.words,
            self.spool + self.lines,
            whole=self.last,
        )


class AttemptLog:
    """The log of one attempt on its node.

    Args:
        folder: the attempt's folder; `words.jsonl` and `shipping.json` in it are this class's own.
        send: stores a frame, given the number of its first line and its body; returns when it is stored.
        changed: set from outside when the spool or the attempt's records changed.
        show: tells whoever follows just now what is on lines that are not ended; nothing depends on it.
    """

    def __init__(
        self, folder: Path, identity: Identity, send: Send, changed: asyncio.Event, show: Show | None = None
    ) -> None:
        self._folder = folder
        self._identity = identity
        self._send = send
        self._show = show
        self._shown: dict[str, str] = {}
        self._changed = changed
        self._reader = spool.SpoolReader(folder / "spool")
        self._words = _read_words(folder / "words.jsonl")
        self._place = _read_place(folder / "shipping.json")
        self._read: list[spool.SpoolBatch] = []
        self._job_ended = False
        self._closed = False
        self._sent_s = float("-inf")
        # Hides secrets in the platform's own words; the job's lines come without them from its shim.
        self.masker = Masker(())

    def say(self, key: str, text: str, *, tail: bool = False) -> None:
        """Adds a line of the platform's own, once for each key, also over restarts."""
        if any(word.key == key for word in self._words):
            return
        word = Word(key, to_us(utc_now()), self.masker.text(text)[:2000], tail)
        _append_whole(self._folder / "words.jsonl", json.dumps(asdict(word)).encode() + b"\n")
        self._words.append(word)
        self._changed.set()

    def job_ended(self) -> None:
        """The spool grows no more: words for the tail may follow once it is read to its end."""
        self._job_ended = True
        self._changed.set()

    def close(self) -> None:
        """No word will follow either: the frame that brings the log to its end says so."""
        self._closed = True
        self._changed.set()

    async def ship(self) -> None:
        """Sends until the log is whole and stored."""
        if self._place.words or self._place.lines or self._place.last:
            await self._send_frame(self._place)
        while not self._place.whole:
            self._changed.clear()
            await self._show_unfinished()
            frame = self._next_frame()
            if frame is None:
                await happens(self._changed, LOOK_S)
            elif (wait_s := self._hold_back_s(frame)) > 0:
                await asyncio.sleep(wait_s)
                self._sent_s = float("-inf")
            else:
                await self._send_frame(frame)

    def _next_frame(self) -> Place | None:
        """What to send next, or None when there is nothing yet."""
        ended, closed = self._job_ended, self._closed  # before reading: only then is "nothing more" final
        place = self._place
        words = self._words_before_tail()
        lines = _count(self._read_spool(place.spool, FRAME_LINES))
        if ended and not self._more_after(place.spool + lines):
            words = len(self._words) - place.word if not lines else words
            whole = closed and place.word + words == len(self._words)
            if words or lines or whole:
                return replace(place, words=words, lines=lines, last=whole)
            return None
        return replace(place, words=words, lines=lines) if words or lines else None

    def _words_before_tail(self) -> int:
        return len(list(takewhile(lambda word: not word.tail, self._words[self._place.word :])))

    def _read_spool(self, start: int, count: int) -> list[spool.SpoolBatch]:
        """A frame is composed from what was just read to see how large it can be."""
        if not self._reader_exists():
            return []
        if self._read and self._read[0].first_line == start and _count(self._read) == count:
            return self._read
        self._read = self._reader.batches_from(start, count, FRAME_BYTES)[:FRAME_BATCHES]
        return self._read

    def _more_after(self, line: int) -> bool:
        return bool(self._reader_exists() and self._reader.batches_from(line, 1, 1))

    def _reader_exists(self) -> bool:
        return (self._folder / "spool").is_dir()

    def _hold_back_s(self, frame: Place) -> float:
        """The job's first line leaves at once; after it, frames that are not full wait for company."""
        if not frame.lines or frame.last or sum(len(batch.payload) for batch in self._read) >= HASTE_BYTES:
            return 0.0
        return self._sent_s + BATCH_S - asyncio.get_running_loop().time()

    async def _send_frame(self, place: Place) -> None:
        body = self._compose(place)
        while len(body) > BODY_BYTES and place.lines > 1:
            place = replace(place, lines=place.lines // 2, last=False)
            body = self._compose(place)
        _write_place(self._folder / "shipping.json", place)
        self._place = place  # whoever goes on after a failure sends exactly this one
        await self._send(place.line, body)
        self._place = place.after()
        if self._place.whole:
            _write_place(self._folder / "shipping.json", self._place)
        if place.lines:
            self._sent_s = asyncio.get_running_loop().time()
            self._reader.acknowledge(place.spool)

    def _compose(self, place: Place) -> bytes:
        words = self._words[place.word : place.word + place.words]
        batches = self._read_spool(place.spool, place.lines) if place.lines else []
        pieces = [_clean(batch) for batch in batches]
        said = [Batch(word.at_us, "nabla", 1) for word in words]
        printed = [Batch(b.at_us, _STREAMS[b.stream], b.line_count, cut=b.cut) for b in batches]
        text = "".join(f"{_one_line(word.text)}\n" for word in words).encode("utf-8", "replace") + b"".join(pieces)
        frame = LogFrame(
            job_id=self._identity.job_id,
            attempt_id=self._identity.attempt_id,
            attempt=self._identity.number,
            rank=self._identity.rank,
            first_line=place.line,
            last=place.last,
            slice=Slice(0, (*said, *printed), text).to_message(),
        )
        return frame.to_wire()

    async def _show_unfinished(self) -> None:
        """A hint, beside the numbered lines: what it shows comes again as a line when it is ended."""
        unfinished = AttemptFolder(self._folder).read_unfinished() if self._show else {}
        if not self._show or unfinished == self._shown:
            return
        self._shown = unfinished
        number, rank = self._identity.number, self._identity.rank
        lines = tuple(
            LogLine(stream=_STREAMS.get(stream, "stdout"), text=_one_line(text), attempt=number, rank=rank)
            for stream, text in unfinished.items()
        )
        await self._show(LogPage(unfinished=lines or (LogLine(attempt=number, rank=rank),)))


def _count(batches: list[spool.SpoolBatch]) -> int:
    return sum(batch.line_count for batch in batches)


def _clean(batch: spool.SpoolBatch) -> bytes:
    """The batch's lines as UTF-8, each ended by a newline, without control characters."""
    payload = batch.payload if batch.payload.endswith(b"\n") and not batch.cut else batch.payload + b"\n"
    if len(payload.translate(None, _CONTROL_BYTES)) == len(payload):
        try:
            payload.decode()
        except UnicodeDecodeError:
            return payload.decode("utf-8", "replace").encode()
        return payload
    return payload.decode("utf-8", "replace").translate(_CONTROLS).encode()


def _one_line(text: str) -> str:
    return text.translate(_CONTROLS).replace("\n", " ")


def _read_words(path: Path) -> list[Word]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    # A crash in the middle of a line leaves half of one: it was never sent.
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(path, len(whole.encode()))
    return [Word(**json.loads(line)) for line in whole.splitlines()]


def _append_whole(path: Path, content: bytes) -> None:
    """All of it or nothing: half a line that a full disk left would spoil the next one."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        if file.write(content) != len(content):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _read_place(path: Path) -> Place:
    try:
        return Place(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return Place()


def _write_place(path: Path, place: Place) -> None:
    """Whole, but not synced: it must survive this process, and a power cut ends the attempt anyway."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(asdict(place)))
    beside.rename(path)
