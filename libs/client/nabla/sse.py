"""Server-sent events, decoded. No input or output here: bytes in, events out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerEvent:
    """One event; `id` is the last id seen on the stream, its own or an earlier one."""

    event: str
    data: str
    id: str


class EventParser:
    """Feed it chunks as they arrive, cut anywhere; it yields each event once its blank line is there.

    An event that the connection broke off in the middle is never yielded, so `last_id` is always that of a whole
    event and is safe to resume from. Lines end with LF or CRLF, as every server writes them.
    """

    def __init__(self) -> None:
        self.last_id = ""
        self._rest = b""
        self._clear()

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            event = self._line(line.rstrip(b"\r").decode("utf-8", "replace"))
            if event is not None:
                yield event

    def _clear(self) -> None:
        self._event = ""
        self._data: list[str] = []
        self._id = self.last_id

    def _line(self, line: str) -> ServerEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        return None

    def _dispatch(self) -> ServerEvent | None:
        self.last_id = self._id
        event = ServerEvent(self._event or "message", "\n".join(self._data), self.last_id) if self._data else None
        self._clear()
        return event
