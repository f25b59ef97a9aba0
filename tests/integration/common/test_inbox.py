"""One effect per message, in batches: what is refused goes alone, what is repeated is recognised, order is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from libs.common.clock import utc_now
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import CreateProject, HaltJob, Principal, Project
from libs.common.errors import Conflict, DiskFull, NotFound, StaleRevision
from libs.common.ids import new_id
from libs.common.inbox import Answer, Inbox
from libs.common.routing import INTERNAL, Route, Rule
from libs.common.store import UnitOfWork
from libs.common.waiting import end
from tests.integration.common.ledger import LedgerStore, Note, count, keep, outbox, size, tell

pytestmark = pytest.mark.integration

ADA = Principal(kind="user", id="u1", team_id="t1", role="member")
BEN = Principal(kind="user", id="u2", team_id="t1", role="member")
applied: list[str] = []


async def halt(message: HaltJob, unit: UnitOfWork, _call: Envelope) -> None:
    """Counts, tells, and only then fails for those that are to fail."""
    applied.append(message.job_id)
    name = message.job_id.split("/")[0]
    note = await unit.session.get(Note, name) or Note(id=name)
    note.count += 1
    unit.session.add(note)
    await unit.session.flush()
    await tell(unit, message.job_id)
    match message.job_id.split("/")[1:]:
        case ["refused"]:
            raise NotFound("gone", "It is gone.")
        case ["twice"]:
            unit.session.expunge_all()
            unit.session.add(Note(id=name))
        case ["stale"] if applied.count(message.job_id) < 3:
            raise StaleRevision("note", name, 1)
        case ["misread"] if applied.count(message.job_id) < 3:
            try:
                raise StaleRevision("note", name, 1)
            except StaleRevision:
                raise NotFound("gone", "It is gone.") from None
        case ["full"]:
            raise DiskFull("here")


async def create(message: CreateProject, unit: UnitOfWork, call: Envelope) -> Project:
    applied.append(message.name)
    if message.name == "taken":
        raise Conflict("project_exists", "It is taken.")
    unit.session.add(Note(id=message.name))
    await tell(unit, message.name)
    return Project(id=new_id("project"), name=message.name, created_by=call.principal.id)


HALT = Route(HaltJob, halt, INTERNAL)
REPEATABLE = Route(HaltJob, halt, INTERNAL, repeatable=True)
CREATE = Route(CreateProject, create, Rule("member", "write"))


@pytest.fixture
async def inbox(store: LedgerStore) -> AsyncIterator[Inbox[UnitOfWork]]:
    applied.clear()
    inbox = Inbox(store, "registry")
    running = asyncio.create_task(inbox.run())
    yield inbox
    await end([running], again_s=1.0)


def order(inbox: Inbox[Any], job_id: str, event_id: str = "", route: Route = HALT) -> asyncio.Task[Answer]:
    call = Envelope(event_id or new_id("event"), "job.halt.v1", "gateway", utc_now())
    return asyncio.create_task(inbox.apply(route, HaltJob(job_id=job_id), call))


def ask(inbox: Inbox[Any], message: Message, key: str = "", who: Principal = ADA) -> asyncio.Task[Answer]:
    call = Envelope(new_id("event"), "project.create.v1", "gateway", utc_now(), idempotency_key=key, sender=who)
    return asyncio.create_task(inbox.apply(CREATE, message, call))


async def outcomes(tasks: list[asyncio.Task[Answer]]) -> list[str]:
    found = await asyncio.gather(*tasks, return_exceptions=True)
    return [each.status if isinstance(each, Answer) else type(each).__name__ for each in found]


async def test_a_refused_message_leaves_a_batch_alone(inbox: Inbox[UnitOfWork], store: LedgerStore) -> None:
    """Also the one that changed the same row, and the one that comes after it in the same batch."""
    commits = 0

    def committed() -> None:
        nonlocal commits
        commits += 1

    inbox.after_commit(committed)
    batch = ["a", "b/refused", "b", "a/refused", "a", "c/twice", "c", "d"]
    found = await outcomes([order(inbox, job_id) for job_id in batch])
    refused = {"b/refused": "NotFound", "a/refused": "NotFound", "c/twice": IntegrityError.__name__}
    assert found == [refused.get(job_id, "created") for job_id in batch]
    assert commits == 1
    assert [await count(store, name) for name in "abcd"] == [2, 1, 1, 1]
    told = [row["headers"].split('"ce-subject": "')[1].split('"')[0] for row in await outbox(store)]
    assert told == ["a", "b", "a", "c", "d"]
    assert [row["id"] for row in store.committed] == [row["id"] for row in await outbox(store)]
    assert await size(store, store.skeleton.inbox) == 5


async def test_a_repeat_is_recognised_in_the_same_batch_and_later(inbox: Inbox[UnitOfWork], store: LedgerStore) -> None:
    assert await outcomes([order(inbox, "a", "ev1"), order(inbox, "a", "ev1"), order(inbox, "a", "ev2")]) == [
        "created",
        "duplicate",
        "created",
    ]
    assert await outcomes([order(inbox, "a", "ev2")]) == ["duplicate"]
    assert await count(store, "a") == 2
    assert len(await outbox(store)) == 2


async def test_a_refused_message_may_come_again_under_its_id(inbox: Inbox[UnitOfWork], store: LedgerStore) -> None:
    assert await outcomes([order(inbox, "a/refused", "ev1")]) == ["NotFound"]
    assert await outcomes([order(inbox, "a", "ev1")]) == ["created"]
    assert await count(store, "a") == 1


async def test_a_repeatable_route_keeps_no_row(inbox: Inbox[UnitOfWork], store: LedgerStore) -> None:
    repeats = [order(inbox, "a", "ev1", REPEATABLE) for _ in range(2)]
    assert await outcomes(repeats) == ["created", "created"]
    assert await size(store, store.skeleton.inbox) == 0


async def test_messages_are_applied_in_the_order_in_which_they_came(
    inbox: Inbox[UnitOfWork], store: LedgerStore
) -> None:
    names = [f"n{number:03d}" for number in range(250)]
    assert set(await outcomes([order(inbox, name) for name in names])) == {"created"}
    assert applied == names
    assert [row["subject"] for row in store.committed] == [row["subject"] for row in await outbox(store)]
    assert [row["id"] for row in store.committed] == sorted(row["id"] for row in store.committed)


@pytest.mark.parametrize("how", ["stale", "misread"])
async def test_a_stale_read_repeats_the_whole_batch(inbox: Inbox[UnitOfWork], store: LedgerStore, how: str) -> None:
    """Also when a handler made a refusal of it, which its neighbours in the batch must not be told."""
    assert await outcomes([order(inbox, "a"), order(inbox, f"b/{how}"), order(inbox, "c")]) == ["created"] * 3
    assert [await count(store, name) for name in "abc"] == [1, 1, 1]
    assert len(await outbox(store)) == 3


async def test_on_a_full_disk_all_of_a_batch_wait(inbox: Inbox[UnitOfWork], store: LedgerStore) -> None:
    found = await outcomes([order(inbox, "a"), order(inbox, "b/refused"), order(inbox, "c/full")])
    assert found == ["DiskFull"] * 3
    assert await outbox(store) == []
    assert await outcomes([order(inbox, "a")]) == ["created"]


async def test_a_request_has_one_answer_for_each_principal_and_key(
    inbox: Inbox[UnitOfWork], store: LedgerStore
) -> None:
    first, again = await asyncio.gather(*(ask(inbox, CreateProject(name="a"), "k") for _ in range(2)))
    assert (first.status, again.status) == ("created", "duplicate")
    assert first.body == again.body
    assert (await ask(inbox, CreateProject(name="a"), "k")).body == first.body
    assert (await ask(inbox, CreateProject(name="b"), "k", BEN)).body != first.body
    with pytest.raises(Conflict, match="Idempotency-Key"):
        await ask(inbox, CreateProject(name="c"), "k")
    assert applied == ["a", "b"]
    assert await size(store, store.skeleton.idempotency) == 2


async def test_a_refused_request_keeps_no_answer(inbox: Inbox[UnitOfWork], store: LedgerStore) -> None:
    for _ in range(2):
        with pytest.raises(Conflict, match="taken"):
            await ask(inbox, CreateProject(name="taken"), "k")
    assert await size(store, store.skeleton.idempotency) == 0
    assert (await ask(inbox, CreateProject(name="free"), "k")).status == "created"


async def test_a_caller_that_went_away_takes_nobody_with_it(inbox: Inbox[UnitOfWork], store: LedgerStore) -> None:
    await keep(store, "z")
    gone, stays = order(inbox, "a"), order(inbox, "b")
    await asyncio.sleep(0)
    gone.cancel()
    assert (await stays).status == "created"
    assert await count(store, "b") == 1
