"""Tries again what broke, with growing pauses and an end.

A fault of the platform's own may pass (a service that answers nonsense during an upgrade), and must not hold an
attempt, its node's resources and its user for ever when it does not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from libs.common.errors import NablaError
from services.executor.domain.execution import short_reason

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)

log = logging.getLogger(__name__)


class GivenUp(NablaError):
    """It broke each time; the text says what and why, for the user to read."""


async def try_within_reason(
    step: Callable[[], Awaitable[None]], what: str, attempt_id: str, is_answer: Callable[[Exception], bool]
) -> None:
    """Does a step that may be begun again at any point.

    Args:
        is_answer: whether an exception is the step's own answer, which trying again would not change.

    Raises:
        GivenUp; what is an answer.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            await step()
        except Exception as error:
            if is_answer(error):
                raise
            log.exception("a step of an attempt broke", extra={"attempt_id": attempt_id, "step": what})
            if pause_s is None:
                why = short_reason(repr(error), 200)
                raise GivenUp(f"the platform failed to {what}, {len(PAUSES_S) + 1} times: {why}") from error
            await asyncio.sleep(pause_s)
        else:
            return
