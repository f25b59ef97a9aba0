"""The outbox relay against a bus that fails on purpose: nothing is lost, and what is published again keeps its id."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import nats.errors
import pytest
from sqlalchemy import event, text

from libs.common import relay as relay_module
from libs.common import upkeep as upkeep_module
from libs.common.bus import Bus
from libs.common.contracts.envelope import Envelope
from libs.common.errors import DiskFull
from libs.common.relay import Relay
from libs.common.store import UnitOfWork
from libs.common.upkeep import DAY_US, Upkeep
from libs.common.waiting import end
from tests.integration.common.ledger import LedgerStore, Time, keep, opened, outbox, size, tell

pytestmark = pytest.mark.integration


@dataclass
class FailingBus:
    """Takes messages while `away` is not set, and never those whose object is in `refused`."""

    away: bool = False
    refused: set[str] = field(default_factory=set)
    taken: list[tuple[str, str]] = field(default_factory=list)
    refusals: int = 0
    hears_of_disconnects: list[Callable[[], None]] = field(default_factory=list)
    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def publish_stored(self, _stream: str, _subject: str, headers: dict[str, str], _body: bytes) -> None:
        envelope = Envelope.parse(headers)
        await asyncio.sleep(0)
        if self.meanwhile:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
        if self.away or envelope.object_id in self.refused:
            self.refusals += 1
            raise nats.errors.NoRespondersError
        self.taken.append((headers["Nats-Msg-Id"], envelope.object_id))

    def on_disconnect(self, action: Callable[[], None]) -> None:
        self.hears_of_disconnects.append(action)

    def disconnect(self) -> None:
        for action in self.hears_of_disconnects:
            action()

    @property
    def objects(self) -> list[str]:
        return [object_id for _, object_id in self.taken]

    @property
    def ids(self) -> set[str]:
        return {message_id for message_id, _ in self.taken}


@pytest.fixture
def bus() -> FailingBus:
    return FailingBus()


class Watched(asyncio.Event):
    """An event that also tells when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited = asyncio.Event()

    async def wait(self) -> Literal[True]:
        self.awaited.set()
        return await super().wait()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick where a test waits for it; the table is looked at by chance only in the test of that.

    What is committed during such a look may leave twice, which the relay allows and exact tests do not.
    """
    monkeypatch.setattr(relay_module, "BACK_OFF_S", 0.02)
    monkeypatch.setattr(relay_module, "LOOK_S", 600.0)
    monkeypatch.setattr(relay_module, "MARK_S", 0.1)


@asynccontextmanager
async def relaying(store: LedgerStore, bus: FailingBus, clock: Time) -> AsyncIterator[None]:
    """A relay that has published what was in the table and waits for more."""
    store.outbox_filled = filled = Watched()
    running = asyncio.create_task(Relay(store, cast("Bus", bus), clock).run())
    try:
        await until(filled.awaited.is_set)
        yield
        assert not running.done()
    finally:
        await end([running], again_s=1.0)


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not (found := condition()) or (not isinstance(found, bool) and not await found):
            await asyncio.sleep(0.01)


async def all_marked(store: LedgerStore) -> bool:
    return all(row["published_us"] is not None for row in await outbox(store))


async def test_what_is_committed_leaves_from_memory_in_order(store: LedgerStore, bus: FailingBus, clock: Time) -> None:
    async with relaying(store, bus, clock):
        said: list[str] = []

        @event.listens_for(store.writer.sync_engine, "before_cursor_execute")
        def note(_c: object, _cursor: object, statement: str, _p: object, _x: object, _many: bool) -> None:
            said.append(statement)

        for number in range(5):
            await keep(store, *(f"n{number}-{each}" for each in range(30)))
        await until(lambda: len(bus.taken) == 150)
        assert bus.objects == [f"n{number}-{each}" for number in range(5) for each in range(30)]
        await until(lambda: all_marked(store))
        # The rows of a commit are marked together, not one by one.
        assert sum("UPDATE outbox" in statement for statement in said) <= 10
    assert len(bus.taken) == 150


async def test_rows_are_marked_late(
    store: LedgerStore, bus: FailingBus, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "MARK_S", 600.0)
    async with relaying(store, bus, clock):
        await keep(store, "a")
        await until(lambda: bus.objects == ["a"])
        assert not await all_marked(store)
        monkeypatch.setattr(relay_module, "MARK_S", 0.01)
        await keep(store, "b")
        await until(lambda: all_marked(store))


async def test_what_was_left_by_the_last_process_is_published_from_the_table(
    store: LedgerStore, bus: FailingBus, clock: Time
) -> None:
    await keep(store, *(f"n{number:03d}" for number in range(250)))
    store.committed.clear()
    async with relaying(store, bus, clock):
        assert await all_marked(store)
    assert bus.objects == [f"n{number:03d}" for number in range(250)]


async def test_what_memory_does_not_have_is_found_in_the_table_after_a_while(
    store: LedgerStore, bus: FailingBus, clock: Time, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    monkeypatch.setattr(relay_module, "LOOK_S", 0.05)
    async with relaying(store, bus, clock), opened(database_url) as other:
        await keep(other, "a")
        await until(lambda: bus.objects == ["a"])


async def test_what_is_committed_behind_a_long_table_leaves_once_and_not_from_memory_too(
    store: LedgerStore, bus: FailingBus, clock: Time
) -> None:
    await keep(store, *(f"n{number:03d}" for number in range(150)))
    bus.meanwhile = lambda: keep(store, *(f"o{number:03d}" for number in range(150)))
    async with relaying(store, bus, clock):
        assert not store.committed
    assert len(bus.taken) == len(bus.ids) == 300


async def test_while_the_bus_is_away_all_waits_in_the_table_and_then_leaves_in_order(
    store: LedgerStore, bus: FailingBus, clock: Time
) -> None:
    bus.away = True
    async with relaying(store, bus, clock):
        for number in range(6):
            await keep(store, f"n{number}")
            # Memory does not grow with the outage.
            await until(lambda: not store.committed)
        assert bus.taken == []
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
        await until(lambda: bus.refusals > 3)
        assert bus.objects == ["a", "c"]
        await keep(store, "d")
        await until(lambda: "d" in bus.objects)
        bus.refused = set()
        await until(lambda: "b" in bus.objects)
        await until(lambda: all_marked(store))


async def test_a_death_between_publishing_and_marking_publishes_again_under_the_same_id(
    store: LedgerStore, bus: FailingBus, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "MARK_S", 600.0)
    async with relaying(store, bus, clock):
        await keep(store, "a", "b")
        await until(lambda: len(bus.taken) == 2)
    assert not await all_marked(store)
    async with relaying(store, bus, clock):
        assert len(bus.taken) == 4
        assert await all_marked(store)
    assert bus.taken[:2] == bus.taken[2:]


@pytest.mark.parametrize("away", [{"seconds": 1}, {"hours": 30}])
async def test_after_a_disconnect_the_last_minutes_before_it_are_published_again_and_no_more(
    store: LedgerStore, bus: FailingBus, clock: Time, away: dict[str, float]
) -> None:
    """However long the bus was away: what an unclean stop takes is what was stored shortly before it."""
    async with relaying(store, bus, clock):
        await keep(store, "old")
        await until(lambda: bus.objects == ["old"])
        await until(lambda: all_marked(store))
        clock.pass_(minutes=8)
        await keep(store, "recent")
        await until(lambda: bus.objects == ["old", "recent"])
        await until(lambda: all_marked(store))
        clock.pass_(**away)
        for times in (1, 2):
            # The second time, too, it is the same minutes: nothing has been stored since.
            bus.disconnect()
            await until(lambda times=times: len(bus.taken) == 2 + times)
            await until(lambda: all_marked(store))
    assert bus.objects == ["old", "recent", "recent", "recent"]
    assert len(bus.ids) == 2


async def test_a_process_that_starts_doubts_the_last_minutes_of_the_one_before(
    store: LedgerStore, bus: FailingBus, clock: Time
) -> None:
    async with relaying(store, bus, clock):
        for name, minutes in (("old", 8.0), ("recent", 0.0)):
            await keep(store, name)
            await until(lambda name=name: name in bus.objects)
            await until(lambda: all_marked(store))
            clock.pass_(minutes=minutes)
    clock.pass_(hours=30)
    async with relaying(store, bus, clock):
        assert bus.objects == ["old", "recent", "recent"]


async def test_what_was_not_marked_yet_at_a_disconnect_is_published_again(
    store: LedgerStore, bus: FailingBus, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "MARK_S", 600.0)
    async with relaying(store, bus, clock):
        await keep(store, "a")
        await until(lambda: bus.objects == ["a"])
        bus.disconnect()
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
        full.set()
        await keep(store, "a")
        await until(lambda: marks > 3)
        assert bus.objects == ["a"]
        full.clear()
        await until(lambda: all_marked(store))
    assert bus.objects == ["a"]


async def test_many_doubtful_messages_are_unmarked_in_steps_and_a_failure_between_them_is_made_good(
    store: LedgerStore, bus: FailingBus, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "ROWS", 10)
    for number in range(35):
        await keep(store, f"n{number}")
        outbox_table = store.skeleton.outbox
        async with store.begin() as unit:
            fresh = outbox_table.update().where(outbox_table.c.published_us.is_(None))
            await unit.execute(fresh.values(published_us=int(clock.now.timestamp() * 1e6)))
        clock.pass_(seconds=1)
    store.committed.clear()
    unmarked: list[int] = []

    @event.listens_for(store.writer.sync_engine, "after_cursor_execute")
    def note(_c: object, cursor: Any, statement: str, parameters: Any, _x: object, _many: bool) -> None:
        if statement.startswith("UPDATE outbox") and (parameters[0] is None or "=NULL" in statement.replace(" ", "")):
            if len(unmarked) == 2 and not failed:
                failed.append(True)
                raise nats.errors.TimeoutError
            unmarked.append(cursor.rowcount)

    failed: list[bool] = []
    async with relaying(store, bus, clock):
        await until(lambda: len(bus.taken) == 35)
        await until(lambda: all_marked(store))
    assert failed
    assert unmarked == [10, 10, 10, 5]
    assert bus.objects == [f"n{number}" for number in range(35)]


async def test_upkeep_lets_others_write_between_its_steps(
    store: LedgerStore, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep_module, "ROWS", 10)
    for number in range(35):
        async with store.begin() as unit:
            await unit.mark_applied(f"ev-{number}")
        clock.pass_(seconds=1)
    clock.pass_(days=50)
    dropped: list[int] = []

    @event.listens_for(store.writer.sync_engine, "after_cursor_execute")
    def note(_c: object, cursor: Any, statement: str, _p: object, _x: object, _many: bool) -> None:
        if statement.startswith("DELETE FROM inbox"):
            dropped.append(cursor.rowcount)

    await Upkeep(store, clock).forget_old()
    assert dropped == [10, 10, 10, 5]
    assert await size(store, store.skeleton.inbox) == 0


async def test_upkeep_finds_what_is_old_by_an_index(tmp_path: Path) -> None:
    """Every ten minutes the one writer would otherwise read through a week of answers."""
    async with opened(f"sqlite:///{tmp_path}/ledger.db") as store:
        said: list[str] = []

        @event.listens_for(store.writer.sync_engine, "before_cursor_execute")
        def note(_c: object, _cursor: object, statement: str, _p: object, _x: object, _many: bool) -> None:
            said.append(statement)

        await Upkeep(store).forget_old()
        async with store.view() as view:
            for statement in [each for each in said if each.startswith(("SELECT", "DELETE"))]:
                plan = text("EXPLAIN QUERY PLAN " + re.sub(r"\?", "1", statement))
                steps = [row.detail for row in await view.execute(plan)]
                assert all("INDEX" in step for step in steps), (statement, steps)


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
