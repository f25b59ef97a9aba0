"""The outbox relay against a bus that fails on purpose: nothing is lost, and what is published again keeps its id."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import nats.errors
import pytest
from sqlalchemy import event

from libs.common import relay as relay_module
from libs.common.bus import Bus
from libs.common.contracts.envelope import Envelope
from libs.common.errors import DiskFull
from libs.common.relay import Relay
from libs.common.store import UnitOfWork
from libs.common.upkeep import DAY_US, Upkeep
from tests.integration.common.ledger import LedgerStore, Time, keep, outbox, size, tell

pytestmark = pytest.mark.integration


@dataclass
class FailingBus:
    """Takes messages while `away` is not set, and never those whose object is in `refused`."""

    away: bool = False
    refused: set[str] = field(default_factory=set)
    taken: list[tuple[str, str]] = field(default_factory=list)
    reconnected: list[Callable[[], None]] = field(default_factory=list)

    async def publish_stored(self, _stream: str, _subject: str, headers: dict[str, str], _body: bytes) -> None:
        envelope = Envelope.parse(headers)
        await asyncio.sleep(0)
        if self.away or envelope.object_id in self.refused:
            raise nats.errors.NoRespondersError
        self.taken.append((headers["Nats-Msg-Id"], envelope.object_id))

    def on_reconnect(self, action: Callable[[], None]) -> None:
        self.reconnected.append(action)

    @property
    def objects(self) -> list[str]:
        return [object_id for _, object_id in self.taken]

    @property
    def ids(self) -> set[str]:
        return {message_id for message_id, _ in self.taken}


@pytest.fixture
def bus() -> FailingBus:
    return FailingBus()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "BACK_OFF_S", 0.02)
    monkeypatch.setattr(relay_module, "LOOK_S", 0.2)
    monkeypatch.setattr(relay_module, "MARK_S", 0.1)


@asynccontextmanager
async def relaying(store: LedgerStore, bus: FailingBus, clock: Time) -> AsyncIterator[None]:
    running = asyncio.create_task(Relay(store, cast("Bus", bus), clock).run())
    try:
        yield
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not (found := condition()) or (not isinstance(found, bool) and not await found):
            await asyncio.sleep(0.01)


async def all_marked(store: LedgerStore) -> bool:
    return all(row["published_us"] is not None for row in await outbox(store))


async def test_what_is_committed_leaves_from_memory_in_order(store: LedgerStore, bus: FailingBus, clock: Time) -> None:
    async with relaying(store, bus, clock):
        await until(lambda: not store.outbox_filled.is_set())
        await asyncio.sleep(0.05)
        reads: list[str] = []

        @event.listens_for(store.writer.sync_engine, "before_cursor_execute")
        def note(_c: object, _cursor: object, statement: str, _p: object, _x: object, _many: bool) -> None:
            reads.append(statement)

        for number in range(5):
            await keep(store, *(f"n{number}-{each}" for each in range(30)))
        await until(lambda: len(bus.taken) == 150)
        assert bus.objects == [f"n{number}-{each}" for number in range(5) for each in range(30)]
        await until(lambda: all_marked(store))
        # The rows are marked together, not one by one.
        assert sum("UPDATE outbox" in statement for statement in reads) <= 4
    assert len(bus.taken) == 150


async def test_rows_are_marked_late(
    store: LedgerStore, bus: FailingBus, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "MARK_S", 1.5)
    async with relaying(store, bus, clock):
        await asyncio.sleep(0.05)
        await keep(store, "a")
        await until(lambda: bus.objects == ["a"])
        assert not await all_marked(store)
        await until(lambda: all_marked(store))


async def test_what_was_left_by_the_last_process_is_published_from_the_table(
    store: LedgerStore, bus: FailingBus, clock: Time
) -> None:
    await keep(store, *(f"n{number:03d}" for number in range(250)))
    store.committed.clear()
    async with relaying(store, bus, clock):
        await until(lambda: len(bus.taken) == 250)
        await until(lambda: all_marked(store))
    assert bus.objects == [f"n{number:03d}" for number in range(250)]


async def test_while_the_bus_is_away_all_waits_in_the_table_and_then_leaves_in_order(
    store: LedgerStore, bus: FailingBus, clock: Time
) -> None:
    bus.away = True
    async with relaying(store, bus, clock):
        for number in range(6):
            await keep(store, f"n{number}")
            await asyncio.sleep(0.03)
        assert bus.taken == []
        # Memory does not grow with the outage.
        assert len(store.committed) <= 2
        bus.away = False
        await until(lambda: len(bus.ids) == 6)
        await until(lambda: all_marked(store))
    first_times = list(dict.fromkeys(bus.objects))
    assert first_times == [f"n{number}" for number in range(6)]


async def test_one_message_that_is_not_taken_does_not_send_its_neighbours_again_and_again(
    store: LedgerStore, bus: FailingBus, clock: Time
) -> None:
    bus.refused = {"b"}
    async with relaying(store, bus, clock):
        await keep(store, "a", "b", "c")
        await until(lambda: {"a", "c"} <= set(bus.objects))
        await asyncio.sleep(0.3)
        assert len(bus.taken) <= 4
        await keep(store, "d")
        await until(lambda: "d" in bus.objects)
        bus.refused = set()
        await until(lambda: "b" in bus.objects)
        await until(lambda: all_marked(store))


async def test_a_death_between_publishing_and_marking_publishes_again_under_the_same_id(
    store: LedgerStore, bus: FailingBus, clock: Time
) -> None:
    async with relaying(store, bus, clock):
        await asyncio.sleep(0.05)
        await keep(store, "a", "b")
        await until(lambda: len(bus.taken) == 2)
    assert not await all_marked(store)
    async with relaying(store, bus, clock):
        await until(lambda: len(bus.taken) == 4)
        await until(lambda: all_marked(store))
    assert bus.taken[:2] == bus.taken[2:]


async def test_after_a_reconnect_the_last_minutes_are_published_again_and_no_more(
    store: LedgerStore, bus: FailingBus, clock: Time
) -> None:
    async with relaying(store, bus, clock):
        await keep(store, "old")
        await until(lambda: bus.objects == ["old"])
        await until(lambda: all_marked(store))
        clock.pass_(minutes=8)
        await keep(store, "recent")
        await until(lambda: all_marked(store))
        before = len(bus.taken)
        for action in bus.reconnected:
            action()
        await until(lambda: len(bus.taken) > before)
        await until(lambda: all_marked(store))
        await asyncio.sleep(0.3)
    # Perhaps twice, from the table and from memory: stored once, as the id is the same.
    assert set(bus.objects[before:]) == {"recent"}
    assert bus.objects.count("old") == 1
    assert len(bus.ids) == 2


async def test_what_was_not_marked_yet_at_a_reconnect_is_published_again(
    store: LedgerStore, bus: FailingBus, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "MARK_S", 30.0)
    async with relaying(store, bus, clock):
        await asyncio.sleep(0.05)
        await keep(store, "a")
        await until(lambda: bus.objects == ["a"])
        for action in bus.reconnected:
            action()
        await until(lambda: bus.objects == ["a", "a"])
    assert len(bus.ids) == 1


async def test_a_full_disk_puts_marking_off_and_nothing_is_sent_twice_for_it(
    store: LedgerStore, bus: FailingBus, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = asyncio.Event()
    marks = 0
    set_published = Relay._set_published

    async def mark(relay: Relay, ids: Any) -> None:
        nonlocal marks
        marks += 1
        if full.is_set():
            raise DiskFull("here")
        await set_published(relay, ids)

    monkeypatch.setattr(Relay, "_set_published", mark)
    async with relaying(store, bus, clock):
        await asyncio.sleep(0.05)
        full.set()
        await keep(store, "a")
        await until(lambda: marks > 3)
        assert bus.objects == ["a"]
        full.clear()
        await until(lambda: all_marked(store))
    assert bus.objects == ["a"]


async def test_upkeep_drops_what_no_repeat_can_ask_for_and_nothing_else(store: LedgerStore, clock: Time) -> None:
    async def leave(day: str) -> None:
        async with store.begin() as unit:
            await unit.mark_applied(f"ev-{day}")
            await unit.keep_answer("user:u1", "project.create", day, "hash", b"{}")
            await tell(unit, f"published-{day}")
            await tell(unit, f"waiting-{day}")

    async def publish(unit: UnitOfWork) -> None:
        table = store.skeleton.outbox
        done = table.update().where(table.c.headers.like("%published-%"), table.c.published_us.is_(None))
        await unit.execute(done.values(published_us=table.c.created_us))

    await leave("first")
    await store.run(publish)
    upkeep = Upkeep(store, clock)
    left: list[tuple[int, int, int]] = []
    for wait_minutes in (59, 2, 7 * 1440 - 62, 2, 37 * 1440 - 2, 2):
        clock.pass_(minutes=wait_minutes)
        await upkeep.forget_old()
        tables = store.skeleton
        left.append(
            (await size(store, tables.outbox), await size(store, tables.idempotency), await size(store, tables.inbox))
        )
    # An hour for what is published, a week for answers, 44 days for ids; what waits to be published stays.
    assert left == [(2, 1, 1), (1, 1, 1), (1, 1, 1), (1, 0, 1), (1, 0, 1), (1, 0, 0)]
    assert [json.loads(row["headers"])["ce-subject"] for row in await outbox(store)] == ["waiting-first"]
    assert DAY_US == 86_400_000_000
