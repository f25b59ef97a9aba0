"""Keyset pages: stable while rows come and go, and as quick on the last page as on the first."""

from __future__ import annotations

import base64
import contextlib

from libs.common.errors import Invalid

DEFAULT_LIMIT = 50
MAX_LIMIT = 500


def page_limit(asked: int) -> int:
    return min(asked, MAX_LIMIT) if asked > 0 else DEFAULT_LIMIT


def encode_cursor(last_id: str) -> str:
    return base64.urlsafe_b64encode(last_id.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """The id after which the page begins.

    Raises:
        Invalid: the cursor was not made by `encode_cursor`.
    """
    with contextlib.suppress(ValueError):
        last_id = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        # Why: the decoder leaves out what is not of its alphabet, and a wrong cursor would be the first page; NUL is
        # in no id, and PostgreSQL takes it in no text.
        if encode_cursor(last_id) == cursor and "\0" not in last_id:
            return last_id
    raise Invalid("bad_cursor", "The cursor is not one that this API gave.", "Start without a cursor.")
