"""A running service: store, inbox, relay, bus, loops, watchdog and its small HTTP side, started and stopped in order.

It has its databases to itself before it touches them: inbox, relay and loops keep pictures of them in memory.
Every service's `app.build` returns one of these; nothing else differs between them but their routes and loops.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import nats.js.errors
from sqlalchemy import func, select

from libs.common.bus import Bus
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import GetService, ServiceStatus
from libs.common.contracts.subjects import DEAD_LETTERS, dead_letter_subject
from libs.common.inbox import Inbox
from libs.common.locks import SoleWriter
from libs.common.migrations import migrate
from libs.common.probes import Probes
from libs.common.provision import provision_consumers
from libs.common.relay import Relay
from libs.common.routing import Route, Routes, Rule
from libs.common.settings import Settings
from libs.common.store import Store, is_outage
from libs.common.upkeep import Upkeep
from libs.common.version import VERSION
from libs.common.waiting import end
from libs.common.watchdog import Watchdog

STATUS_RULE = Rule(role="viewer", scope="read", services=frozenset({"gateway"}))
CONSUMER_CHECK_S = 10.0
OUTAGE_PAUSE_S = 5.0

log = logging.getLogger(__name__)
Loop = Callable[[], Awaitable[None]]


@dataclass
class Service:
    """What `app.build` wires together.

    Args:
        loops: endless coroutines of the service's own, such as reconciliation; one that raises ends the process,
            unless its database is away, busy or full: then it begins again.
        describe: ready or not, and why, for people.
        further: inboxes of databases beside the first, by the name that routes give. Their writers never wait for
            each other. Name `runs` has its tables in `store/runs.py` and its chain in `migrations/runs/`.
        before_start: done once, with the databases migrated and before the first message.
    """

    name: str
    settings: Settings
    store: Store[Any]
    bus: Bus
    inbox: Inbox[Any]
    routes: Routes
    loops: tuple[Loop, ...] = ()
    describe: Callable[[], tuple[bool, str]] = lambda: (True, "")
    further: Mapping[str, Inbox[Any]] = field(default_factory=dict)
    before_start: Loop | None = None
    _started: float = field(default_factory=time.monotonic)
    _dead_letters: int = 0
    # What the bus lacks of what this service listens to.
    _unheard: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Starts everything, and on leaving stops it: no new message, then the loops, then the connections.

        Raises:
            AlreadyHeld: another process runs on one of the databases, which this one has not touched.
        """
        self.bus.serve(with_status(self.routes, self._status), self.inbox, self.further)
        probes = Probes(self.name, self.settings, lambda: self.bus.connected and self._condition()[0])
        locks = [SoleWriter(inbox.store.url, chain) for chain, inbox in self._databases.items()]
        tasks: list[asyncio.Task[None]] = []
        try:
            # Alive, and not ready, while it waits for a lock.
            await probes.start()
            for lock in locks:
                await lock.take()
            probes.tell_address()
            await self._prepare_databases()
            await self._connect()
            databases = [loop for inbox in self._inboxes for loop in self._loops_of(inbox)]
            kept = (lock.keep for lock in locks)
            own = (*kept, *databases, self._keep_consumers, Watchdog(lambda: self.bus.connected).run)
            tasks = [asyncio.create_task(_coroutine(loop), name=str(loop)) for loop in (*own, *self.loops)]
            for task in tasks:
                task.add_done_callback(_end_on_error)
            log.info("started", extra={"version": VERSION})
            yield
        finally:
            await self.bus.stop()
            await end(tasks)
            await probes.stop()
            for inbox in self._inboxes:
                await inbox.store.close()
            for lock in locks:
                await lock.release()

    @property
    def _inboxes(self) -> tuple[Inbox[Any], ...]:
        return (self.inbox, *self.further.values())

    @property
    def _databases(self) -> dict[str, Inbox[Any]]:
        """By the name of their chain of migrations."""
        return {self.name: self.inbox} | {f"{self.name}/{name}": inbox for name, inbox in self.further.items()}

    def _loops_of(self, inbox: Inbox[Any]) -> tuple[Loop, ...]:
        return inbox.run, Relay(inbox.store, self.bus).run, Upkeep(inbox.store).run

    async def _prepare_databases(self) -> None:
        for chain, inbox in self._databases.items():
            await migrate(inbox.store.writer, chain)
        if self.before_start:
            await self.before_start()

    async def _connect(self) -> None:
        """Connects, and provisions this service's consumers before subscribing to them."""
        await self.bus.broker.connect()
        await provision_consumers(self.bus.jetstream, self.routes)
        await self.bus.start()

    async def _keep_consumers(self) -> None:
        """Makes a consumer that somebody deleted again: its subscription would wait for ever and say nothing."""
        while True:
            await asyncio.sleep(CONSUMER_CHECK_S)
            try:
                await provision_consumers(self.bus.jetstream, self.routes)
                self._dead_letters = await self._count_dead_letters()
            except (nats.errors.Error, nats.js.errors.Error) as error:
                log.warning("consumers could not be checked", extra={"reason": repr(error)})
                self._unheard = f"the bus does not have its streams: {error}"
            else:
                self._unheard = ""

    def _condition(self) -> tuple[bool, str]:
        return (False, self._unheard) if self._unheard else self.describe()

    async def _count_dead_letters(self) -> int:
        subject = dead_letter_subject(self.name)
        info = await self.bus.jetstream.stream_info(DEAD_LETTERS, subjects_filter=subject)
        return (info.state.subjects or {}).get(subject, 0)

    async def _status(self, _message: Message, _view: Any, _call: Envelope) -> ServiceStatus:
        ready, detail = self._condition()
        return ServiceStatus(
            name=self.name,
            version=VERSION,
            ready=ready,
            detail=detail,
            uptime_s=round(time.monotonic() - self._started, 1),
            outbox_waiting=sum([await _outbox_waiting(inbox.store) for inbox in self._inboxes]),
            dead_letters=self._dead_letters,
        )


async def _outbox_waiting(store: Store[Any]) -> int:
    outbox = store.skeleton.outbox
    waiting = select(func.count()).select_from(outbox).where(outbox.c.published_us.is_(None))
    async with store.view() as view:
        return int((await view.execute(waiting)).scalar_one())


def with_status(routes: Routes, status: Any) -> Routes:
    """The routes plus the question that every service answers about itself."""
    return Routes(routes.service, (*routes.routes, Route(GetService, status, STATUS_RULE)), routes.sends)


async def _coroutine(loop: Loop) -> None:
    while True:
        try:
            await loop()
        except Exception as error:
            if not is_outage(error):
                raise
            # A process that starts again would not get further, and this one can still answer.
            log.warning("a loop waits for the database", extra={"reason": repr(error)})
            await asyncio.sleep(OUTAGE_PAUSE_S)
        else:
            return


def _end_on_error(task: asyncio.Task[None]) -> None:
    if task.cancelled() or task.exception() is None:
        return
    log.critical("a loop died: %s", task.get_name(), exc_info=task.exception())
    # A service with a dead loop looks alive and is not; it starts again from its database.
    raise SystemExit(70)
