"""What the registry's two units of work have in common: told races, pages and the audit.

Rows are read and written with Core statements only: the messages of a batch share one session, whose identity map
would show the later of them rows as they were before the earlier.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, Column, Executable, Index, MetaData, Select, String, Table
from sqlalchemy.exc import IntegrityError
from sqlmodel import SQLModel

from libs.common.clock import to_us
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.errors import StaleRevision
from libs.common.ids import new_id
from libs.common.pages import decode_cursor, encode_cursor, page_limit
from libs.common.store import UnitOfWork
from libs.common.telemetry import redact

AUDIT_DETAIL = 500


def table_of(model: type[SQLModel]) -> Table:
    table: Table = vars(model)["__table__"]
    return table


def audit_table(metadata: MetaData) -> Table:
    """Who did what to what, and when; a row in the transaction that did it."""
    return Table(
        "audit",
        metadata,
        Column("id", String(40), primary_key=True),
        Column("team_id", String(40), nullable=False),
        Column("actor", String(64), nullable=False),
        Column("action", String(64), nullable=False),
        Column("object_id", String(40), nullable=False),
        Column("detail", String(AUDIT_DETAIL), nullable=False),
        Column("at_us", BigInteger, nullable=False),
        Index("audit_of_team", "team_id", "at_us"),
        Index("audit_by_time", "at_us"),
    )


@dataclass(frozen=True, slots=True)
class Page:
    """Rows of one page, and the cursor of the next, empty after the last."""

    rows: list[Any]
    next_cursor: str


class CatalogueUnit(UnitOfWork):
    """What both of the registry's units of work can do: tell a lost race, cut pages, keep the audit."""

    audit_rows: Table

    @asynccontextmanager
    async def unique(self, what: str) -> AsyncIterator[None]:
        """Makes a row that somebody else inserted first a reason to run the whole unit again, which then sees it."""
        try:
            yield
        except IntegrityError:
            raise StaleRevision(what, "with the same key", 0) from None

    async def insert(self, model: type[SQLModel], values: dict[str, Any]) -> None:
        table = table_of(model)
        async with self.unique(table.name):
            await self.execute(table.insert().values(**values))

    async def one(self, query: Executable) -> Any:
        """The first row, or None."""
        return (await self.execute(query)).first()

    async def page(self, query: Select[Any], id_column: Column[Any], cursor: str, limit: int) -> Page:
        """Newest first, as ids sort by time."""
        limit = page_limit(limit)
        if cursor:
            query = query.where(id_column < decode_cursor(cursor))
        rows = list(await self.execute(query.order_by(id_column.desc()).limit(limit + 1)))
        more = len(rows) > limit
        return Page(rows[:limit], encode_cursor(getattr(rows[limit - 1], id_column.name)) if more else "")

    async def audit(self, call: Envelope, message: Message, object_id: str, team_id: str, actor: str = "") -> None:
        """Keeps who asked for `message`: the actor, or else its principal.

        The message is cut to AUDIT_DETAIL characters, and without hashes and what proto/ redacts.
        """
        shown = {name for name, field in type(message).model_fields.items() if field.repr}
        given = {key: value for key, value in message.model_dump(mode="json", include=shown).items() if value}
        detail = {key: value for key, value in given.items() if not key.endswith("_hash")}
        row = {
            "id": new_id("audit"),
            "team_id": team_id,
            "actor": actor or f"{call.principal.kind}:{call.principal.id}",
            "action": message.ROUTE.name,
            "object_id": object_id,
            "detail": redact(json.dumps(detail, ensure_ascii=False))[:AUDIT_DETAIL],
            "at_us": to_us(self.now),
        }
        await self.execute(self.audit_rows.insert().values(**row))

    async def forget_audit(self, before_us: int) -> None:
        await self.execute(self.audit_rows.delete().where(self.audit_rows.c.at_us < before_us))
