"""The store's promises on each kind of database, with several writers at once and with none left on the disk."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import HaltJob, Project, ProjectCreated
from libs.common.contracts.subjects import MAX_MESSAGE_BYTES
from libs.common.errors import DiskFull, StaleRevision, TooLarge
from libs.common.store import UnitOfWork, is_disk_full, is_transient
from tests.integration.common.ledger import TEAM, LedgerStore, Note, count, keep, opened, outbox, size, tell, told
from tests.support.disks import fill, free

pytestmark = pytest.mark.integration


async def read_modify_write(unit: UnitOfWork) -> None:
    note = await unit.session.get(Note, "n")
    assert note
    await asyncio.sleep(0)
    await unit.swap(Note, "n", note.revision, {"count": note.count + 1})


async def patient(store: LedgerStore) -> None:
    """As the bus does: what is stale after all tries comes again."""
    while True:
        try:
            return await store.run(read_modify_write)
        except StaleRevision:
            continue


async def test_no_update_of_ten_writers_is_lost(store: LedgerStore) -> None:
    await keep(store, "n")

    async def write_twenty() -> None:
        for _ in range(20):
            await patient(store)

    await asyncio.gather(*(write_twenty() for _ in range(10)))
    async with store.view() as view:
        note = await view.session.get(Note, "n")
    assert note
    assert (note.count, note.revision) == (200, 201)


async def test_two_stores_on_one_database_lose_no_update_either(store: LedgerStore, database_url: str) -> None:
    await keep(store, "n")
    async with opened(database_url) as rival:
        await asyncio.gather(*(patient(each) for each in (store, rival) for _ in range(15)))
    assert await count(store, "n") == 30


async def test_saving_over_a_newer_revision_is_refused_and_leaves_nothing(store: LedgerStore) -> None:
    await keep(store, "n")

    async def overwrite(unit: UnitOfWork) -> None:
        unit.session.add(Note(id="other"))
        await tell(unit, "other")
        await unit.swap(Note, "n", 7, {"count": 5})

    with pytest.raises(StaleRevision, match="note n is no longer at revision 7"):
        await store.run(overwrite)
    assert (await count(store, "n"), await count(store, "other")) == (0, None)
    assert len(await outbox(store)) == 1
    assert len(store.committed) == 1


async def test_a_stale_unit_of_work_is_done_again_from_its_start(store: LedgerStore) -> None:
    await keep(store, "n")
    tries = 0

    async def work(unit: UnitOfWork) -> str:
        nonlocal tries
        tries += 1
        await tell(unit, "n")
        if tries < 3:
            raise StaleRevision("note", "n", 1)
        return "done"

    assert await store.run(work) == "done"
    assert tries == 3
    assert len(await outbox(store)) == 2


async def test_other_errors_are_not_repeated(store: LedgerStore) -> None:
    tries = 0

    async def work(unit: UnitOfWork) -> None:
        nonlocal tries
        tries += 1
        unit.session.add(Note(id="n"))
        await unit.session.flush()
        unit.session.expunge_all()
        unit.session.add(Note(id="n"))

    with pytest.raises(IntegrityError):
        await store.run(work)
    assert tries == 1
    assert await count(store, "n") is None


async def test_a_locked_database_is_waited_for(store: LedgerStore, database_url: str) -> None:
    await keep(store, "n")
    is_sqlite = database_url.startswith("sqlite")
    held, tried, tries = asyncio.Event(), asyncio.Event(), 0

    async def hold(rival: LedgerStore) -> None:
        async with rival.begin() as unit:
            await read_modify_write(unit)
            held.set()
            await tried.wait()

    async def impatient(unit: UnitOfWork) -> None:
        nonlocal tries
        tries += 1
        if tries == 2:
            tried.set()
            await holding
        if not is_sqlite:
            await unit.execute(text("SET LOCAL lock_timeout = '10ms'"))
        await read_modify_write(unit)

    if is_sqlite:
        async with store.writer.connect() as connection:
            await connection.execute(text("PRAGMA busy_timeout=10"))
    async with opened(database_url) as rival:
        holding = asyncio.create_task(hold(rival))
        await held.wait()
        await store.run(impatient)
        await holding
    assert tries == 2
    assert await count(store, "n") == 2


async def test_rows_and_messages_are_there_together_or_not_at_all(store: LedgerStore) -> None:
    async def break_off(unit: UnitOfWork) -> None:
        unit.session.add(Note(id="n"))
        await tell(unit, "n")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await store.run(break_off)
    assert await count(store, "n") is None
    assert await outbox(store) == []
    assert not store.committed
    assert not store.outbox_filled.is_set()


async def test_what_a_view_writes_is_never_there(store: LedgerStore) -> None:
    await keep(store, "n")

    async def write() -> None:
        async with store.view() as view:
            view.session.add(Note(id="other"))
            await view.session.flush()

    with pytest.raises(DBAPIError, match=r"(?i)read-?only"):
        await write()
    async with store.view() as view:
        view.session.add(Note(id="third"))
    assert [await count(store, each) for each in ("n", "other", "third")] == [0, None, None]


async def test_rows_of_a_view_stay_readable_after_it(store: LedgerStore) -> None:
    await keep(store, "n")
    async with store.view() as view:
        note = await view.session.get(Note, "n")
    assert note
    assert note.revision == 1


async def test_all_messages_of_a_unit_are_written_in_one_statement(store: LedgerStore) -> None:
    inserts: list[str] = []

    @event.listens_for(store.writer.sync_engine, "before_cursor_execute")
    def note_inserts(_c: object, _cursor: object, statement: str, _p: object, _x: object, _many: bool) -> None:
        if "INSERT INTO outbox" in statement:
            inserts.append(statement)

    async with store.begin() as unit:
        for number in range(50):
            await tell(unit, f"n{number}")
        assert not inserts
    assert len(inserts) == 1
    assert await size(store, store.skeleton.outbox) == 50
    async with store.begin():
        pass
    assert len(inserts) == 1


async def test_a_message_in_the_outbox_is_whole_and_in_order(store: LedgerStore) -> None:
    async with store.begin() as unit:
        await tell(unit, "n1")
        order = HaltJob(job_id="js1")
        await unit.emit(order, team_id=TEAM, object_id="js1", project_id="pr1", revision=4, attempt=2)
    first, second = await outbox(store)
    assert (first["stream"], first["subject"]) == ("EVT", "nabla.evt.t1.project.created.v1")
    assert (second["stream"], second["subject"]) == ("CMD", "nabla.cmd.scheduler.0.job.halt.v1")
    envelope = Envelope.parse(json.loads(second["headers"]))
    assert (envelope.id, envelope.source, envelope.time) == (second["id"], "registry", unit.now)
    assert (envelope.project_id, envelope.revision, envelope.attempt) == ("pr1", 4, 2)
    assert HaltJob.from_wire(second["body"]) == order
    assert [row["id"] for row in store.committed] == [first["id"], second["id"]]
    assert store.outbox_filled.is_set()


async def test_what_no_stream_takes_is_refused_before_it_can_block_the_outbox(store: LedgerStore) -> None:
    largest: Message = told("n", "x" * (MAX_MESSAGE_BYTES - 2048))
    async with store.begin() as unit:
        await unit.emit(largest, team_id=TEAM, object_id="n")
        with pytest.raises(TooLarge):
            await tell(unit, "n", "x" * MAX_MESSAGE_BYTES)
    assert len(await outbox(store)) == 1


async def test_a_message_takes_effect_in_one_unit_only(store: LedgerStore) -> None:
    async with store.begin() as unit:
        assert await unit.mark_applied("ev1")
        assert not await unit.mark_applied("ev1")
    async with store.begin() as unit:
        assert not await unit.mark_applied("ev1")
        assert await unit.mark_applied("ev2")
    async with store.view() as view:
        assert [await view.already_applied(each) for each in ("ev1", "ev2", "ev3")] == [True, True, False]


async def test_an_answer_is_kept_by_principal_operation_and_key(store: LedgerStore) -> None:
    async with store.begin() as unit:
        await unit.keep_answer("user:u1", "project.create", "k", "hash", b"answer")
    async with store.view() as view:
        assert await view.given_answer("user:u1", "project.create", "k") == ("hash", b"answer")
        for other in (("user:u2", "project.create", "k"), ("user:u1", "x", "k"), ("user:u1", "project.create", "K")):
            assert await view.given_answer(*other) is None


@pytest.fixture
def database_on_small_disk(database_url: str, small_disk: Path) -> Iterator[str]:
    """The same kind of database, where there is little room for it."""
    if database_url.startswith("sqlite"):
        yield f"sqlite:///{small_disk}/test.db"
        return
    folder = small_disk / "tablespace"
    folder.mkdir()
    shutil.chown(folder, "postgres", "postgres")
    server, name = database_url.rsplit("/", 1)
    _psql(
        server,
        f"CREATE TABLESPACE {name}_small LOCATION '{folder}'",
        f"CREATE DATABASE {name}_small TABLESPACE {name}_small",
    )
    yield f"{server}/{name}_small"
    _psql(server, f"DROP DATABASE {name}_small", f"DROP TABLESPACE {name}_small")


def _psql(server: str, *statements: str) -> None:
    for statement in statements:
        command = ["psql", "-q", "-d", f"{server}/postgres", "-c", statement]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


async def test_a_full_disk_is_said_plainly_and_writing_goes_on_when_there_is_room(
    database_on_small_disk: str, small_disk: Path
) -> None:
    async with opened(database_on_small_disk) as store:
        await keep(store, "before")
        fill(small_disk)
        kept = await _fill(store)
        with pytest.raises(DiskFull, match=r"disk that holds the database at .* is full"):
            await keep(store, *(f"more-{number}" for number in range(2000)))
        assert await count(store, "more-0") is None
        assert await count(store, "before") == 0
        free(small_disk)
        await keep(store, "after")
        assert await count(store, "after") == 0
        assert len(await outbox(store)) == kept + 2 == len(store.committed)


async def _fill(store: LedgerStore) -> int:
    """Writes until it is refused; how many were taken."""
    for number in range(5000):
        try:
            async with store.begin() as unit:
                unit.session.add(Note(id=f"fill-{number}"))
                event_ = ProjectCreated(project=Project(id=f"fill-{number}", description="x" * 50_000))
                await unit.emit(event_, team_id=TEAM, object_id=f"fill-{number}")
        except DiskFull:
            return number
    raise AssertionError("the disk never became full")


async def test_what_may_pass_is_told_from_what_stays(store: LedgerStore) -> None:
    with pytest.raises(DBAPIError) as caught:
        async with store.begin() as unit:
            await unit.execute(text("SELECT * FROM nothing_of_that_name"))
    assert not is_transient(caught.value)
    assert not is_disk_full(caught.value)
    assert is_transient(StaleRevision("note", "n", 1))
    assert not is_transient(DiskFull("here"))
    assert is_disk_full(DiskFull("here"))
