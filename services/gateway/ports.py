"""What the gateway needs from outside: owners to ask, hints to hear, the event stream to read."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from libs.common.contracts.message import Message
from libs.common.contracts.messages import Principal

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Once:
    """By what a request is known when it comes again.

    Args:
        key: the client's own idempotency key, or one made for it.
        request_hash: of the client's own words; empty when the key is not its own, as it then cannot repeat it.
    """

    key: str
    request_hash: str = ""


class Owners(Protocol):
    """Whoever owns what a message is about."""

    async def ask(
        self,
        message: Message,
        reply: type[M],
        principal: Principal,
        *,
        once: Once | None = None,
        service: str = "",
        timeout_s: float = 5.0,
    ) -> M:
        """The owner's answer; raises a Refusal, which is Unavailable when it does not answer."""

    async def earlier(self, message: Message, reply: type[M], principal: Principal, once: Once) -> M:
        """What the owner of this kind of message answered to the same words; raises NotFound when nothing was."""


@dataclass(frozen=True, slots=True)
class Hint:
    """A message heard on core NATS: it may be missing, so it never carries state alone."""

    subject: str
    object_id: str
    body: bytes


class Listener(Protocol):
    """One listener's bounded queue of hints."""

    async def next(self, timeout_s: float) -> Hint | None:
        """The next hint, or None when none came in time or some were dropped; raises Closing at shutdown."""


class Hints(Protocol):
    def listen(self, *subjects: str) -> AbstractAsyncContextManager[Listener]:
        """Hears these subjects from the moment it is entered."""


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event with its place in the stream."""

    sequence: int
    type: str
    object_id: str
    project_id: str
    body: bytes


class EventLog(Protocol):
    async def newest(self) -> int:
        """The sequence of the newest event of any team: whoever reads after it gets what comes from now on.

        Raises:
            Unavailable: the stream cannot be asked now.
        """

    def read(self, team_id: str, after: int) -> AsyncGenerator[StoredEvent | None, None]:
        """A team's events after this sequence, in order, without end; None when all is quiet."""


class Closing(Exception):
    """The gateway is stopping: open streams end now, and their clients resume elsewhere or later."""
