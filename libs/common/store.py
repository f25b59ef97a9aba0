"""State: one database per service, one transaction per unit of work, SQLite or PostgreSQL behind the same code.

A unit of work holds what a handler loads and saves and the messages that leave with it: `emit` writes them into
the outbox of the same transaction, so a message exists exactly when its cause does. The relay publishes them.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from sqlalchemy import (
    BigInteger,
    Column,
    CursorResult,
    Executable,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    event,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoFreeConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlmodel import SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession

from libs.common.clock import Clock, to_us, utc_now
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import Principal
from libs.common.contracts.subjects import MAX_MESSAGE_BYTES, stream_of, subject_for
from libs.common.errors import DiskFull, StaleRevision, TooLarge
from libs.common.faults import crash_point
from libs.common.ids import new_id
from libs.common.telemetry import current_traceparent

MAX_TRIES = 5
# What NATS and its client add to the headers of a stored message.
PUBLISHING_BYTES = 256
DISK_FULL = "53100"
_SQLITE_PASSING = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR")
# Connection lost, serialization failure, out of resources, operator's intervention, lock not to be had in time.
_POSTGRES_PASSING = ("08", "40", "53", "57", "55P03")


class Skeleton:
    """The three tables that every service has beside its own.

    outbox: messages committed but perhaps not yet published; inbox: ids of messages already applied;
    idempotency: answers already given, by principal, operation and key.
    """

    def __init__(self, metadata: MetaData) -> None:
        self.outbox = Table(
            "outbox",
            metadata,
            Column("id", String(40), primary_key=True),
            Column("stream", String(16), nullable=False),
            Column("subject", String(255), nullable=False),
            Column("headers", String, nullable=False),
            Column("body", LargeBinary, nullable=False),
            Column("created_us", BigInteger, nullable=False),
            Column("published_us", BigInteger, nullable=True),
            Index("outbox_waiting", "published_us", "id"),
        )
        self.inbox = Table(
            "inbox",
            metadata,
            Column("event_id", String(40), primary_key=True),
            Column("applied_us", BigInteger, nullable=False),
            Index("inbox_applied", "applied_us"),
        )
        self.idempotency = Table(
            "idempotency",
            metadata,
            Column("principal", String(64), primary_key=True),
            Column("operation", String(64), primary_key=True),
            Column("key", String(255), primary_key=True),
            Column("request_hash", String(64), nullable=False),
            Column("answer", LargeBinary, nullable=False),
            Column("created_us", BigInteger, nullable=False),
            Index("idempotency_created", "created_us"),
        )


class UnitOfWork:
    """One transaction of one service. Services derive from it and add their repositories."""

    def __init__(self, session: AsyncSession, skeleton: Skeleton, source: str, now: datetime) -> None:
        self.session = session
        self.now = now
        self._skeleton = skeleton
        self._source = source
        # Rows for the outbox, written together when the unit commits.
        self.outgoing: list[dict[str, Any]] = []

    async def emit(
        self,
        message: Message,
        *,
        team_id: str,
        object_id: str,
        project_id: str = "",
        revision: int = 0,
        attempt: int = 0,
        sender: Principal | None = None,
    ) -> None:
        """Puts an event or a command into the outbox; it leaves when this unit of work has committed.

        Raises:
            TooLarge: no stream takes it, so it would stay in the outbox and hold up all that come after it.
        """
        envelope = Envelope(
            id=new_id("event"),
            type=message.ROUTE.type,
            source=self._source,
            time=self.now,
            object_id=object_id,
            team_id=team_id,
            project_id=project_id,
            revision=revision,
            attempt=attempt,
            traceparent=current_traceparent(),
            sender=sender,
        )
        headers, body = json.dumps(envelope.headers()), message.to_wire()
        if len(headers) + len(body) > MAX_MESSAGE_BYTES - PUBLISHING_BYTES:
            detail = f"What {object_id} would tell others with {message.ROUTE.name} is {len(body):,} bytes long."
            raise TooLarge("message_too_large", detail, f"The most is about {MAX_MESSAGE_BYTES:,} bytes.")
        row = {
            "id": envelope.id,
            "stream": stream_of(message.ROUTE),
            "subject": subject_for(type(message), team=team_id, object_id=object_id),
            "headers": headers,
            "body": body,
            "created_us": to_us(self.now),
            "published_us": None,
        }
        self.outgoing.append(row)

    async def fill_outbox(self) -> None:
        """Writes what was emitted; called once, by the store, before it commits."""
        if self.outgoing:
            await self.execute(self._skeleton.outbox.insert(), self.outgoing)

    async def execute(
        self, statement: Executable, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    ) -> CursorResult[Any]:
        """Runs a Core statement in this transaction, once or for each of `rows`; models go through `session`."""
        connection = await self.session.connection()
        return await connection.execute(statement, rows)

    async def swap(self, table: type[SQLModel], object_id: str, revision: int, values: Mapping[str, Any]) -> None:
        """Saves `values` and the next revision if the row still has `revision`.

        Raises:
            StaleRevision: another unit of work saved first; the whole unit is repeated.
        """
        columns = cast("Any", table)
        statement = (
            update(table)
            .where(columns.id == object_id, columns.revision == revision)
            .values(**values, revision=revision + 1)
        )
        result = await self.execute(statement)
        if result.rowcount != 1:
            raise StaleRevision(str(columns.__tablename__), object_id, revision)

    async def already_applied(self, event_id: str) -> bool:
        inbox = self._skeleton.inbox
        return (await self.execute(select(inbox.c.event_id).where(inbox.c.event_id == event_id))).first() is not None

    async def mark_applied(self, event_id: str) -> bool:
        """Notes that a message takes effect in this unit; False when it did so in an earlier one."""
        # Both dialects know the same words; SQLAlchemy has them once for each.
        is_sqlite = (await self.session.connection()).dialect.name == "sqlite"
        insert = sqlite.insert(self._skeleton.inbox) if is_sqlite else postgresql.insert(self._skeleton.inbox)
        row = {"event_id": event_id, "applied_us": to_us(self.now)}
        return (await self.execute(insert.values(row).on_conflict_do_nothing())).rowcount == 1

    async def given_answer(self, principal: str, operation: str, key: str) -> tuple[str, bytes] | None:
        """Request hash and answer given earlier under this key."""
        table = self._skeleton.idempotency
        query = select(table.c.request_hash, table.c.answer).where(
            table.c.principal == principal, table.c.operation == operation, table.c.key == key
        )
        row = (await self.execute(query)).first()
        return (row.request_hash, row.answer) if row else None

    async def keep_answer(self, principal: str, operation: str, key: str, request_hash: str, answer: bytes) -> None:
        await self.execute(
            self._skeleton.idempotency.insert().values(
                principal=principal,
                operation=operation,
                key=key,
                request_hash=request_hash,
                answer=answer,
                created_us=to_us(self.now),
            )
        )


U = TypeVar("U", bound=UnitOfWork)
T = TypeVar("T")


class Store(Generic[U]):
    """A service's database.

    Args:
        url: `sqlite:////path/file.db` or `postgresql://user:password@host/name`.
        unit: the service's unit of work class.
        skeleton: the tables made with the service's own metadata.
        source: the service's name, for envelopes and crash points.
    """

    def __init__(self, url: str, unit: type[U], skeleton: Skeleton, source: str, clock: Clock = utc_now) -> None:
        self.url = async_url(url)
        self.skeleton = skeleton
        self.source = source
        self._unit = unit
        self._clock = clock
        self._writer = writer_engine(self.url)
        self._reader = reader_engine(self.url)
        # Outbox rows of this process's own commits, in their order: the relay need not read them back.
        self.committed: deque[dict[str, Any]] = deque()
        self.outbox_filled = asyncio.Event()

    @property
    def writer(self) -> AsyncEngine:
        return self._writer

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[U]:
        """A writing transaction: commits at the end, rolls back on any error. Do no network call inside.

        Raises:
            DiskFull: there was no room for it.
        """
        with self._naming_a_full_disk():
            async with AsyncSession(self._writer, expire_on_commit=False) as session:
                async with session.begin():
                    unit = self._unit(session, self.skeleton, self.source, self._clock())
                    yield unit
                    await session.flush()
                    await unit.fill_outbox()
                    crash_point(f"{self.source}.before_commit")
                crash_point(f"{self.source}.after_commit")
                # Before anything is awaited: a later commit's rows must not come first.
                if unit.outgoing:
                    self.committed.extend(unit.outgoing)
                    self.outbox_filled.set()

    @asynccontextmanager
    async def view(self) -> AsyncIterator[U]:
        """A reading transaction; what it writes is never committed."""
        with self._naming_a_full_disk():
            async with AsyncSession(self._reader, expire_on_commit=False) as session:
                yield self._unit(session, self.skeleton, self.source, self._clock())
                # Rows stay readable after the view: rolling back would expire them.
                session.expunge_all()
                await session.rollback()

    async def run(self, work: Callable[[U], Awaitable[T]]) -> T:
        """Runs `work` in a writing transaction, again from the start when the database or another writer says so."""
        for attempt in range(1, MAX_TRIES + 1):
            try:
                async with self.begin() as unit:
                    return await work(unit)
            except (StaleRevision, DBAPIError) as error:
                if attempt == MAX_TRIES or not is_transient(error):
                    raise
                await asyncio.sleep(random.uniform(0.005, 0.02) * 2**attempt)
        raise AssertionError("unreachable")

    @contextmanager
    def _naming_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            if is_disk_full(error):
                raise DiskFull(self._place) from error
            raise

    @property
    def _place(self) -> str:
        if self.url.get_backend_name() == "sqlite":
            return str(Path(self.url.database or "").parent)
        return f"the PostgreSQL server {self.url.host}"

    async def close(self) -> None:
        await self._writer.dispose()
        await self._reader.dispose()


def is_transient(error: BaseException) -> bool:
    """Whether repeating the whole unit of work may help: a lock, a lost connection, a serialization failure."""
    if isinstance(error, StaleRevision | NoFreeConnection):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if _sqlite_error(error).startswith(_SQLITE_PASSING):
        return True
    state = _sqlstate(error)
    return error.connection_invalidated or (state != DISK_FULL and state.startswith(_POSTGRES_PASSING))


def is_outage(error: BaseException) -> bool:
    """Whether the database itself is away, busy or full: no matter what was asked of it, it has to be waited for."""
    if isinstance(error, StaleRevision):
        return False
    return isinstance(error, ConnectionError) or is_transient(error) or is_disk_full(error)


def is_disk_full(error: BaseException) -> bool:
    """Whether the database could not grow; repeating helps once somebody has made room."""
    if isinstance(error, DBAPIError):
        return _sqlite_error(error) == "SQLITE_FULL" or _sqlstate(error) == DISK_FULL
    return isinstance(error, DiskFull)


def _sqlite_error(error: DBAPIError) -> str:
    return str(getattr(error.orig, "sqlite_errorname", ""))


def _sqlstate(error: DBAPIError) -> str:
    return str(getattr(error.orig, "sqlstate", "") or "")


def async_url(url: str) -> URL:
    parsed = make_url(url)
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    return parsed.set(drivername=drivers.get(parsed.drivername, parsed.drivername))


def writer_engine(url: URL) -> AsyncEngine:
    if url.get_backend_name() == "sqlite":
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        _tune_sqlite(engine, "BEGIN IMMEDIATE", read_only=False)
        return engine
    return _postgres(url, read_only=False)


def reader_engine(url: URL) -> AsyncEngine:
    if url.get_backend_name() == "sqlite":
        engine = create_async_engine(url, pool_size=4, max_overflow=4)
        _tune_sqlite(engine, "BEGIN", read_only=True)
        return engine
    return _postgres(url, read_only=True)


def _tune_sqlite(engine: AsyncEngine, begin: str, *, read_only: bool) -> None:
    pragmas = [
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=5000",
        "trusted_schema=OFF",
    ]
    if read_only:
        pragmas.append("query_only=ON")

    @event.listens_for(engine.sync_engine, "connect")
    def set_pragmas(connection: Any, _record: Any) -> None:
        # The driver's own transaction handling begins too late (measured: lost updates); we begin ourselves.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin_transaction(connection: Any) -> None:
        connection.exec_driver_sql(begin)


def _postgres(url: URL, *, read_only: bool) -> AsyncEngine:
    settings = {"lock_timeout": "5s", "idle_in_transaction_session_timeout": "30s"}
    if read_only:
        settings["default_transaction_read_only"] = "on"
    return create_async_engine(
        url, pool_size=4, max_overflow=4, pool_pre_ping=True, connect_args={"server_settings": settings}
    )
