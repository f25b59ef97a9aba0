"""Ships the log of one attempt to the bus, each line once and in order, whatever dies in between.

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

from libs.common.clock import from_us, to_us, utc_now
from libs.common.contracts.message import WIRE
from libs.common.contracts.messages import LogFrame
from libs.common.waiting import happens
from services.executor.adapters import spool
from services.executor.adapters.masking import Masker

BATCH_S = 0.05
FRAME_LINES = 800
FRAME_BYTES = 96 * 1024
# Beneath the stream's limit of 256 KB, which counts headers too.
BODY_BYTES = 230 * 1024
LINE_BYTES = 30 * 1024
LOOK_S = 2.0
# The whole log of an attempt, however it is read, cannot hold these; written as six bytes each they would also
# make a frame too large.
_CONTROLS = {code: "\ufffd" for code in range(32) if chr(code) not in "\t\r\x1b"}
_quoted = json.JSONEncoder(ensure_ascii=False).encode
_STREAMS = {"o": "stdout", "e": "stderr"}

log = logging.getLogger(__name__)
Send = Callable[[int, bytes], Awaitable[None]]


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
    """

    def __init__(self, folder: Path, identity: Identity, send: Send, changed: asyncio.Event) -> None:
        self._folder = folder
        self._identity = identity
        self._send = send
        self._changed = changed
        self._reader = spool.SpoolReader(folder / "spool")
        self._words = _read_words(folder / "words.jsonl")
        self._place = _read_place(folder / "shipping.json")
        self._read: list[spool.LogLine] = []
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
        lines = self._read_spool(place.spool)
        if ended and len(lines) < FRAME_LINES and not self._more_after(place.spool + len(lines)):
            words = len(self._words) - place.word if not lines else words
            whole = closed and place.word + words == len(self._words)
            if words or lines or whole:
                return replace(place, words=words, lines=len(lines), last=whole)
            return None
        return replace(place, words=words, lines=len(lines)) if words or lines else None

    def _words_before_tail(self) -> int:
        return len(list(takewhile(lambda word: not word.tail, self._words[self._place.word :])))

    def _read_spool(self, start: int, count: int = FRAME_LINES) -> list[spool.LogLine]:
        """A frame is composed from what was just read to see how large it can be."""
        if not self._reader_exists():
            return []
        if self._read and self._read[0].number == start and len(self._read) == count:
            return self._read
        self._read = self._reader.read_from(start, max_lines=count, max_bytes=FRAME_BYTES)
        return self._read

    def _more_after(self, line: int) -> bool:
        return bool(self._reader_exists() and self._reader.read_from(line, max_lines=1))

    def _reader_exists(self) -> bool:
        return (self._folder / "spool").is_dir()

    def _hold_back_s(self, frame: Place) -> float:
        """The job's first line leaves at once; after it, frames that are not full wait for company."""
        if not frame.lines or frame.last or frame.lines >= FRAME_LINES // 2:
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
        """A LogFrame on the wire. Written by hand: through the message class a flood takes ten times as long."""
        words = self._words[place.word : place.word + place.words]
        lines = self._read_spool(place.spool, place.lines) if place.lines else []
        parts = [self._line(_time(word.at_us), "nabla", word.text) for word in words]
        moments = {at_us: _time(at_us) for at_us in {line.at_us for line in lines}}
        parts += [self._line(moments[line.at_us], _STREAMS[line.stream], _fitting(line.text)) for line in lines]
        frame = LogFrame(
            job_id=self._identity.job_id,
            attempt_id=self._identity.attempt_id,
            attempt=self._identity.number,
            rank=self._identity.rank,
            first_line=place.line,
            last=place.last,
        )
        head = frame.model_dump_json(exclude={"lines"}, context=WIRE)
        return f'{head[:-1]},"lines":[{",".join(parts)}]}}'.encode("utf-8", "replace")

    def _line(self, at: str, stream: str, text: str) -> str:
        number, rank = self._identity.number, self._identity.rank
        return f'{{"at":"{at}","stream":"{stream}","text":{_quoted(text)},"attempt":{number},"rank":{rank}}}'


def _time(at_us: int) -> str:
    return from_us(at_us).isoformat().replace("+00:00", "Z")


def _fitting(text: str) -> str:
    """Without what would make a frame too large: control characters take six bytes each, and so do escapes."""
    text = text.translate(_CONTROLS)
    if len(text) > LINE_BYTES and len(_quoted(text).encode("utf-8", "replace")) > 6 * LINE_BYTES:
        return text[:LINE_BYTES] + " [nabla: cut]"
    return text


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
