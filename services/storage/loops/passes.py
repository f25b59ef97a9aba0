"""How a loop goes through its rows without one of them ending or holding up the others."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from libs.common.errors import StaleRevision, Unavailable
from libs.common.store import is_outage

ROWS_A_PASS = 20

log = logging.getLogger(__name__)


class Row(Protocol):
    id: str


R = TypeVar("R", bound=Row)


async def calmly(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Runs one pass; what it could not do now is left to the next one."""
    try:
        await work()
    except (Unavailable, StaleRevision) as error:
        log.warning("%s: put off", what, extra={"reason": str(error)})


def in_turn(rows: Sequence[R], limit: int) -> Iterator[tuple[R, str]]:
    """Each row, and after which id the next pass begins if this row is the last one done; "" is a new turn."""
    for number, row in enumerate(rows, 1):
        yield row, "" if number == len(rows) < limit else row.id


async def apart(what: str, row_id: str, work: Callable[[], Awaitable[None]]) -> None:
    """Does one row's work; what is wrong with this row alone is told, and left to the next turn.

    Raises:
        Unavailable: whoever is needed is away, and the other rows would fare no better.
    """
    try:
        await work()
    except Unavailable:
        raise
    except StaleRevision as error:
        log.info("%s: put off", what, extra={"object": row_id, "reason": str(error)})
    except Exception as error:
        if is_outage(error):
            raise
        log.exception("%s: left until the next turn", what, extra={"object": row_id})
