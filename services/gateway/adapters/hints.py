"""Hints from core NATS, shared: one subscription for all clients that follow the same thing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from libs.common.bus import Bus
from services.gateway.ports import Closing, Hint

QUEUE = 256


class QueuedListener:
    """A bounded queue. When its owner is too slow it is emptied, and the owner reads what it missed."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Hint | None] = asyncio.Queue(QUEUE)
        self._closing = False

    def put(self, hint: Hint) -> None:
        if self._queue.full():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._queue.put_nowait(None)
            return
        self._queue.put_nowait(hint)

    def close(self) -> None:
        self._closing = True
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    async def next(self, timeout_s: float) -> Hint | None:
        if self._closing:
            raise Closing
        try:
            async with asyncio.timeout(timeout_s):
                hint = await self._queue.get()
        except TimeoutError:
            return None
        if self._closing:
            raise Closing
        return hint


@dataclass
class _Shared:
    subscription: Subscription | None = None
    listeners: set[QueuedListener] = field(default_factory=set)

    async def hear(self, message: Msg) -> None:
        hint = Hint(message.subject, (message.headers or {}).get("ce-subject", ""), message.data)
        for listener in self.listeners:
            listener.put(hint)


class NatsHints:
    """Subscribes when the first listener comes, unsubscribes when the last has gone."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._shared: dict[str, _Shared] = {}
        self._changing = asyncio.Lock()
        self._closing = False

    @asynccontextmanager
    async def listen(self, *subjects: str) -> AsyncIterator[QueuedListener]:
        if self._closing:
            raise Closing
        listener = QueuedListener()
        try:
            for subject in subjects:
                await self._add(subject, listener)
            yield listener
        finally:
            # Shielded: a client that goes away cancels us, and the subscription must go all the same.
            await asyncio.shield(self._remove(subjects, listener))

    def close(self) -> None:
        """Ends every listener: the process is about to stop."""
        self._closing = True
        for shared in self._shared.values():
            for listener in shared.listeners:
                listener.close()

    @property
    def subscription_count(self) -> int:
        return len(self._shared)

    async def _add(self, subject: str, listener: QueuedListener) -> None:
        async with self._changing:
            shared = self._shared.get(subject) or _Shared()
            if shared.subscription is None:
                shared.subscription = await self._bus.client.subscribe(subject, cb=shared.hear)
                self._shared[subject] = shared
            shared.listeners.add(listener)

    async def _remove(self, subjects: tuple[str, ...], listener: QueuedListener) -> None:
        async with self._changing:
            for subject in subjects:
                shared = self._shared.get(subject)
                if shared is None:
                    continue
                shared.listeners.discard(listener)
                if not shared.listeners and shared.subscription:
                    del self._shared[subject]
                    # Also while the bus is away: the client would subscribe again once it is back.
                    with suppress(nats.errors.Error):
                        await shared.subscription.unsubscribe()
