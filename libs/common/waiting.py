"""Waiting that ends when it is told to.

`asyncio.wait_for` is not used anywhere: on Python 3.11 a cancellation that comes in the moment in which what is
waited for is there is forgotten, and the loop that was told to end goes on for ever. `asyncio.timeout` keeps it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

AGAIN_S = 10.0


async def happens(event: asyncio.Event, within_s: float) -> bool:
    """Returns when the event is set, or False when it was not in time."""
    try:
        async with asyncio.timeout(within_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def end(tasks: Collection[asyncio.Task[Any]], again_s: float = AGAIN_S) -> None:
    """Returns when all have ended. A library, such as nats-py, may have forgotten the cancellation: it is repeated.

    Args:
        again_s: longer than what a task does before it goes, which a second cancellation would break off.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=again_s)
