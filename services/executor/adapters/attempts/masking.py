"""Hides the values of secrets in what a job prints: logs are read by more people, and for longer, than jobs run.

A net for accidents and no wall: a job that means to tell its secret only has to spell it backwards. Hidden are the
value as it is and as base64, percent-encoded and in JSON, each line of it by itself. Stdlib only: shims use it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus

MASK = b"***"
# Shorter ones would blank half of a log, and are no secrets.
LEAST = 6
# A longer text is hidden in pieces: what may be held back of a line, and what each look costs, stay bounded.
PIECE = 1024
MOST_FORMS = 2000


class Masker:
    """Knows the values of one job."""

    def __init__(self, values: Iterable[str]) -> None:
        kept = [value for value in values if len(value) >= LEAST]
        plain = {form for value in kept for form in _pieces(value.encode())}
        encoded = {form for value in kept for form in _encoded(value.encode())}
        forms = plain | encoded if len(plain | encoded) <= MOST_FORMS else plain
        self._forms = tuple(sorted(forms, key=len, reverse=True))
        self._longest = len(self._forms[0]) if self._forms else 0

    def text(self, text: str) -> str:
        """A whole text with the mask in the place of each value."""
        if not self._forms:
            return text
        return self.whole(text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")

    def whole(self, data: bytes) -> bytes:
        for form in self._forms:
            if form in data:
                data = data.replace(form, MASK)
        return data

    def stream(self) -> MaskedStream:
        return MaskedStream(self)

    def open_from(self, data: bytes) -> int:
        """Where in `data` a value may begin whose end has not come yet; its length when none does.

        No form holds a line's end, so whatever has come to one is whole.
        """
        line = max(data.rfind(b"\n") + 1, len(data) - self._longest + 1)
        if line >= len(data):
            return len(data)
        tail = data[line:]
        cut = min((_unfinished(tail, form) for form in self._forms), default=len(tail))
        # A value that ends behind the cut is part of what is not decided yet.
        for form in self._forms:
            start = data.find(form, max(0, line + cut - len(form) + 1))
            if 0 <= start < line + cut:
                return self.open_from(data[:start]) if start else 0
        return line + cut


class MaskedStream:
    """One stream of a job, in the pieces in which it comes: a value cut in two by them is hidden all the same."""

    def __init__(self, masker: Masker) -> None:
        self._masker = masker
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be shown by now: all but a last part that may be the beginning of a value."""
        if not self._masker._longest:
            return data
        data = self._held + data
        cut = self._masker.open_from(data)
        self._held = data[cut:]
        return self._masker.whole(data[:cut])

    def end(self) -> bytes:
        """What is left when nothing more comes."""
        held, self._held = self._held, b""
        return self._masker.whole(held)


def _unfinished(tail: bytes, form: bytes) -> int:
    """The first place in `tail` from which it goes to its end as the form begins."""
    place = tail.find(form[:1], max(0, len(tail) - len(form) + 1))
    while place >= 0:
        if form.startswith(tail[place:]):
            return place
        place = tail.find(form[:1], place + 1)
    return len(tail)


def _pieces(text: bytes) -> Iterator[bytes]:
    for line in text.replace(b"\r", b"\n").split(b"\n"):
        for start in range(0, len(line), PIECE):
            piece = line[start : start + PIECE]
            if len(piece) >= LEAST:
                yield piece


def _encoded(value: bytes) -> Iterator[bytes]:
    text = value.decode()
    for form in (quote(text, safe=""), quote(text), quote_plus(text), _in_json(text, False), _in_json(text, True)):
        yield from _pieces(form.encode())
    yield from _pieces(base64.encodebytes(value))
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for offset in range(3):
            yield from _pieces(_core(value, offset, encode(b"\0" * offset + value)))


def _in_json(text: str, only_ascii: bool) -> str:
    return json.dumps(text, ensure_ascii=only_ascii)[1:-1]


def _core(value: bytes, offset: int, encoded: bytes) -> bytes:
    """The characters of a base64 text that only the value decides, whatever stands before and behind it."""
    first = (offset * 8 + 5) // 6
    last = (offset + len(value)) * 8 // 6
    return encoded[first:last]
