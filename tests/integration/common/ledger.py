"""A small service of one table for suites of the skeleton: notes that are written, counted and told of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Table, func, select
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel

from libs.common.clock import Clock, utc_now
from libs.common.contracts.messages import Project, ProjectCreated
from libs.common.store import Skeleton, Store, UnitOfWork

TEAM = "t1"


class Base(SQLModel, registry=registry()):
    pass


class Note(Base, table=True):
    id: str = Field(primary_key=True)
    count: int = 0
    revision: int = 1


SKELETON = Skeleton(Base.metadata)
LedgerStore = Store[UnitOfWork]


class Time:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = utc_now()

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **of_it: float) -> None:
        self.now += timedelta(**of_it)


@asynccontextmanager
async def opened(url: str, clock: Clock = utc_now) -> AsyncIterator[LedgerStore]:
    """The ledger's store, with its tables made when they are missing."""
    store = Store(url, UnitOfWork, SKELETON, "registry", clock)
    try:
        async with store.writer.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield store
    finally:
        await store.close()


def told(note_id: str, name: str = "") -> ProjectCreated:
    return ProjectCreated(project=Project(id=note_id, team_id=TEAM, name=name))


async def tell(unit: UnitOfWork, note_id: str, name: str = "") -> None:
    await unit.emit(told(note_id, name), team_id=TEAM, object_id=note_id)


async def keep(store: LedgerStore, *note_ids: str) -> None:
    """Notes, each with its event, in one transaction."""
    async with store.begin() as unit:
        for note_id in note_ids:
            unit.session.add(Note(id=note_id))
            await tell(unit, note_id)


async def count(store: LedgerStore, note_id: str) -> int | None:
    async with store.view() as view:
        note = await view.session.get(Note, note_id)
        return note.count if note else None


async def size(store: LedgerStore, table: Table) -> int:
    async with store.view() as view:
        return int((await view.execute(select(func.count()).select_from(table))).scalar_one())


async def outbox(store: LedgerStore) -> list[dict[str, Any]]:
    table = store.skeleton.outbox
    async with store.view() as view:
        return [dict(row) for row in (await view.execute(select(table).order_by(table.c.id))).mappings()]
