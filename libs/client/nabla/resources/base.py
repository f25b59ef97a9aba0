"""What all kinds of object share: a transport, and lists that arrive page by page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar
from urllib.parse import quote

from nabla.decoding import decode
from nabla.errors import NablaError
from nabla.record import Record
from nabla.transport import Params, Transport

T = TypeVar("T", bound=Record)
PAGE = 200


class Resource:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _paged(self, path: str, cls: type[T], params: Params, limit: int | None) -> Iterator[T]:
        """All objects of a list, or the first `limit`, fetching a page only when it is needed."""
        cursor, left = "", limit
        while left is None or left > 0:
            size = PAGE if left is None else min(PAGE, left)
            page = self._transport.get(path, {**params, "limit": size, "cursor": cursor})
            items, cursor = _page(page)
            yield from (decode(cls, item) for item in items[:size])
            left = None if left is None else left - len(items)
            if not cursor:
                return


def _page(page: object) -> tuple[list[object], str]:
    items = page.get("items") if isinstance(page, dict) else None
    if not (isinstance(page, dict) and isinstance(items, list)):
        raise NablaError("The server's answer is not a list.", "Is the client older or newer than the server?")
    return items, str(page.get("next_cursor") or "")


def segment(name: str) -> str:
    """A name as one segment of a path, whatever characters it holds."""
    return quote(name, safe="")
