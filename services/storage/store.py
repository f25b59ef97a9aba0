"""Storage's tables and repositories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import BigInteger, Column, ColumnElement, Index, LargeBinary, String, Text, delete, func, insert, update
from sqlalchemy.orm import registry
from sqlalchemy.orm.attributes import set_committed_value
from sqlmodel import Field, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from libs.common.clock import from_us
from libs.common.contracts.messages import Fileset
from libs.common.store import Skeleton, UnitOfWork
from services.storage.domain.filesets import DELETED, OPEN, SEALED, Entry
from services.storage.domain.logs import ENDED, LIVE, Block


class Base(SQLModel, registry=registry()):
    """Apart from the tables of other services in the same process."""


class FilesetRow(Base, table=True):
    __tablename__ = "fileset"
    __table_args__ = (
        Index("fileset_digest", "team_id", "digest"),
        Index("fileset_job", "job_id", "kind", "attempt"),
        Index("fileset_touched", "state", "touched_us"),
    )
    id: str = Field(primary_key=True, max_length=40)
    team_id: str = Field(max_length=40)
    project_id: str = Field(max_length=40)
    kind: str = Field(max_length=16)
    state: str = Field(max_length=16)
    digest: str = Field(max_length=64)
    file_count: int
    size_bytes: int = Field(sa_column=Column(BigInteger, nullable=False))
    job_id: str = Field(max_length=40)
    attempt: int
    rank: int = 0
    created_us: int = Field(sa_column=Column(BigInteger, nullable=False))
    # When upload URLs were last given.
    touched_us: int = Field(sa_column=Column(BigInteger, nullable=False))
    sealed_us: int | None = Field(default=None, sa_column=Column(BigInteger, nullable=True))
    # Versions that nobody named when it was sealed have been removed.
    tidy: bool = False
    revision: int = 1


class FileRow(Base, table=True):
    __tablename__ = "file"
    fileset_id: str = Field(primary_key=True, max_length=40)
    number: int = Field(primary_key=True)
    path: str = Field(sa_column=Column(Text, nullable=False))
    size_bytes: int = Field(sa_column=Column(BigInteger, nullable=False))
    md5: str = Field(max_length=32)
    sha256: str = Field(max_length=64)
    # The object version that was checked; empty while the set is open.
    version: str = Field(default="", max_length=128)


class LogRow(Base, table=True):
    """The log of one job. `id` is the job's."""

    __tablename__ = "log"
    __table_args__ = (Index("log_state", "state", "ended_us"), Index("log_live_bytes", "live_bytes"))
    id: str = Field(primary_key=True, max_length=40)
    team_id: str = Field(max_length=40)
    project_id: str = Field(default="", max_length=40)
    state: str = Field(default=LIVE, max_length=16)
    job_revision: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    last_sequence: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    size_bytes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    # Packed bytes still in the database.
    live_bytes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    ended_us: int | None = Field(default=None, sa_column=Column(BigInteger, nullable=True))
    revision: int = 1


class AttemptRow(Base, table=True):
    """An attempt that the scheduler started; the last frame of each of its ranks is awaited."""

    __tablename__ = "log_attempt"
    job_id: str = Field(primary_key=True, max_length=40)
    attempt_id: str = Field(primary_key=True, max_length=40)
    number: int
    rank_count: int = 1


class SourceRow(Base, table=True):
    """How far the lines of one attempt and rank have come."""

    __tablename__ = "log_source"
    job_id: str = Field(primary_key=True, max_length=40)
    attempt_id: str = Field(primary_key=True, max_length=40)
    rank: int = Field(primary_key=True)
    next_line: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    last: bool = False
    # Early frames wait for lines of this source.
    holds: bool = False


class HeldRow(Base, table=True):
    """A frame that came before the lines that it follows."""

    __tablename__ = "log_held"
    __table_args__ = (Index("log_held_arrived", "arrived_us"),)
    job_id: str = Field(primary_key=True, max_length=40)
    attempt_id: str = Field(primary_key=True, max_length=40)
    rank: int = Field(primary_key=True)
    first_line: int = Field(sa_column=Column(BigInteger, primary_key=True))
    line_count: int
    arrived_us: int = Field(sa_column=Column(BigInteger, nullable=False))
    frame: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class ChunkRow(Base, table=True):
    """Lines of a log that are not in the object store yet, or have not been there for long."""

    __tablename__ = "log_chunk"
    __table_args__ = (Index("log_chunk_stored", "stored_us"),)
    job_id: str = Field(primary_key=True, max_length=40)
    first_sequence: int = Field(sa_column=Column(BigInteger, primary_key=True))
    last_sequence: int = Field(sa_column=Column(BigInteger, nullable=False))
    body: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    # When a block took these lines over.
    stored_us: int | None = Field(default=None, sa_column=Column(BigInteger, nullable=True))


class BlockRow(Base, table=True):
    """Lines of a log that are in the object store, and at which bytes of which object."""

    __tablename__ = "log_block"
    __table_args__ = (Index("log_block_stored", "stored_us"),)
    job_id: str = Field(primary_key=True, max_length=40)
    first_sequence: int = Field(sa_column=Column(BigInteger, primary_key=True))
    last_sequence: int = Field(sa_column=Column(BigInteger, nullable=False))
    key: str = Field(sa_column=Column(String(255), nullable=False))
    offset_bytes: int = Field(sa_column=Column(BigInteger, nullable=False))
    length_bytes: int = Field(sa_column=Column(BigInteger, nullable=False))
    stored_us: int = Field(sa_column=Column(BigInteger, nullable=False))


@dataclass(frozen=True, slots=True)
class Part:
    """One object of a log: which lines, and how long it is."""

    key: str
    job_id: str
    first_sequence: int
    last_sequence: int
    size_bytes: int


SKELETON = Skeleton(Base.metadata)
Row = TypeVar("Row", LogRow, SourceRow)
Key = TypeVar("Key", bound=Hashable)


class Filesets:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, fileset_id: str) -> FilesetRow | None:
        return await self._session.get(FilesetRow, fileset_id)

    async def with_digest(self, team_id: str, kind: str, digest: str) -> Sequence[FilesetRow]:
        """Open and sealed sets with this content, newest first."""
        query = (
            select(FilesetRow)
            .where(
                col(FilesetRow.team_id) == team_id,
                col(FilesetRow.digest) == digest,
                col(FilesetRow.kind) == kind,
                col(FilesetRow.state) != DELETED,
            )
            .order_by(col(FilesetRow.id).desc())
            .limit(50)
        )
        return (await self._session.exec(query)).all()

    async def newest_artifacts(self, team_id: str, job_id: str) -> Sequence[FilesetRow]:
        """The sealed artifacts of the job's greatest attempt that has some, those of each rank, by rank."""
        query = (
            select(FilesetRow)
            .where(
                col(FilesetRow.job_id) == job_id,
                col(FilesetRow.kind) == "artifacts",
                col(FilesetRow.team_id) == team_id,
                col(FilesetRow.state) == SEALED,
            )
            .order_by(col(FilesetRow.attempt).desc(), col(FilesetRow.rank), col(FilesetRow.id).desc())
        )
        found: dict[int, FilesetRow] = {}
        for row in (await self._session.exec(query)).all():
            first = next(iter(found.values()), row)
            if row.attempt == first.attempt:
                found.setdefault(row.rank, row)
        return list(found.values())

    async def add(self, row: FilesetRow, entries: Sequence[Entry]) -> None:
        self._session.add(row)
        await self._session.flush()
        files = [
            {
                "fileset_id": row.id,
                "number": entry.number,
                "path": entry.path,
                "size_bytes": entry.size_bytes,
                "md5": entry.md5,
                "sha256": entry.sha256,
                "version": "",
            }
            for entry in entries
        ]
        if files:
            await self._session.exec(insert(FileRow), params=files)

    async def files(self, fileset_id: str, after: int = -1, limit: int | None = None) -> Sequence[FileRow]:
        query = (
            select(FileRow)
            .where(col(FileRow.fileset_id) == fileset_id, col(FileRow.number) > after)
            .order_by(col(FileRow.number))
            .limit(limit)
        )
        return (await self._session.exec(query)).all()

    async def pin(self, fileset_id: str, versions: Sequence[tuple[int, str]]) -> None:
        """Writes down which version of each object was checked."""
        rows = [{"fileset_id": fileset_id, "number": number, "version": v} for number, v in versions]
        if rows:
            await self._session.exec(update(FileRow), params=rows)

    async def forgotten(self, touched_before_us: int, limit: int) -> Sequence[FilesetRow]:
        """Open sets that nobody asked for since then."""
        query = select(FilesetRow).where(col(FilesetRow.state) == OPEN, col(FilesetRow.touched_us) < touched_before_us)
        return (await self._session.exec(query.order_by(col(FilesetRow.touched_us)).limit(limit))).all()

    async def deleted(self, after_id: str, limit: int) -> Sequence[FilesetRow]:
        return await self._in_turn(DELETED, after_id, limit)

    async def untidy(self, sealed_before_us: int, after_id: str, limit: int) -> Sequence[FilesetRow]:
        """Sets sealed before then whose other object versions are still there."""
        tidy, sealed = col(FilesetRow.tidy).is_(False), col(FilesetRow.sealed_us) < sealed_before_us
        return await self._in_turn(SEALED, after_id, limit, tidy, sealed)

    async def _in_turn(
        self, state: str, after_id: str, limit: int, *conditions: ColumnElement[bool]
    ) -> Sequence[FilesetRow]:
        query = select(FilesetRow).where(col(FilesetRow.state) == state, col(FilesetRow.id) > after_id, *conditions)
        return (await self._session.exec(query.order_by(col(FilesetRow.id)).limit(limit))).all()

    async def drop(self, fileset_id: str) -> None:
        await self._session.exec(delete(FileRow).where(col(FileRow.fileset_id) == fileset_id))
        await self._session.exec(delete(FilesetRow).where(col(FilesetRow.id) == fileset_id))


class Logs:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session
        self._logs: dict[str, LogRow] = {}
        self._sources: dict[tuple[str, str, int], SourceRow] = {}

    async def get(self, job_id: str) -> LogRow | None:
        return await self._once(LogRow, job_id, self._logs)

    async def add(self, row: SQLModel) -> None:
        self._session.add(row)
        await self._session.flush()

    async def attempt(self, job_id: str, attempt_id: str) -> AttemptRow | None:
        return await self._session.get(AttemptRow, (job_id, attempt_id))

    async def newest_attempt(self, job_id: str) -> int:
        query = select(func.max(AttemptRow.number)).where(col(AttemptRow.job_id) == job_id)
        return (await self._session.exec(query)).one() or 0

    async def source(self, job_id: str, attempt_id: str, rank: int) -> SourceRow | None:
        return await self._once(SourceRow, (job_id, attempt_id, rank), self._sources)

    async def _once(self, table: type[Row], key: Key, known: dict[Key, Row]) -> Row | None:
        """The row, read once for all frames of a batch: the session is emptied between them.

        Within a savepoint it is read anew, as one that was rolled back would have left it wrong.
        """
        row = known.get(key)
        if row is None or self._session.in_nested_transaction():
            row = await self._session.get(table, key)
            if row is not None:
                known[key] = row
        elif row not in self._session:
            self._session.add(row)
        return row

    async def attempts_and_sources(self, job_id: str) -> tuple[dict[str, int], list[tuple[str, bool]]]:
        attempts = select(AttemptRow.attempt_id, AttemptRow.rank_count).where(col(AttemptRow.job_id) == job_id)
        sources = select(SourceRow.attempt_id, SourceRow.last).where(col(SourceRow.job_id) == job_id)
        started = (await self._session.exec(attempts)).all()
        heard = (await self._session.exec(sources)).all()
        return dict(started), list(heard)

    async def hold(self, row: HeldRow) -> None:
        """Keeps an early frame; of two that begin at the same line the one with more lines."""
        key = (row.job_id, row.attempt_id, row.rank, row.first_line)
        known = await self._session.get(HeldRow, key)
        if known is None:
            await self.add(row)
        elif row.line_count >= known.line_count:
            known.line_count, known.frame = row.line_count, row.frame
            await self._session.flush()

    async def held(self, job_id: str, attempt_id: str = "", rank: int = 0) -> Sequence[HeldRow]:
        """Early frames in the order of their lines; of the whole job when no attempt is named."""
        query = select(HeldRow).where(col(HeldRow.job_id) == job_id)
        if attempt_id:
            query = query.where(col(HeldRow.attempt_id) == attempt_id, col(HeldRow.rank) == rank)
        query = query.order_by(col(HeldRow.attempt_id), col(HeldRow.rank), col(HeldRow.first_line))
        return (await self._session.exec(query)).all()

    async def release(self, row: HeldRow) -> None:
        await self._session.delete(row)
        await self._session.flush()

    async def with_gap_since(self, arrived_before_us: int, after_id: str, limit: int) -> Sequence[LogRow]:
        """Logs with a frame that came before then and still waits, in the order of their ids."""
        waiting = select(HeldRow.job_id).where(col(HeldRow.arrived_us) < arrived_before_us)
        query = select(LogRow).where(col(LogRow.id).in_(waiting), col(LogRow.id) > after_id)
        return (await self._session.exec(query.order_by(col(LogRow.id)).limit(limit))).all()

    async def add_chunk(self, job_id: str, first: int, last: int, body: bytes) -> None:
        values = {"job_id": job_id, "first_sequence": first, "last_sequence": last, "body": body}
        await self._session.exec(insert(ChunkRow).values(**values))

    async def chunks(self, job_id: str, after: int, limit: int) -> Sequence[ChunkRow]:
        """Chunks with lines beyond `after`, in order."""
        query = (
            select(ChunkRow)
            .where(col(ChunkRow.job_id) == job_id, col(ChunkRow.last_sequence) > after)
            .order_by(col(ChunkRow.first_sequence))
            .limit(limit)
        )
        return (await self._session.exec(query)).all()

    async def waiting_chunks(self, job_id: str, limit: int) -> Sequence[ChunkRow]:
        """Chunks that no block has taken over yet, in order."""
        query = (
            select(ChunkRow)
            .where(col(ChunkRow.job_id) == job_id, col(ChunkRow.stored_us).is_(None))
            .order_by(col(ChunkRow.first_sequence))
            .limit(limit)
        )
        return (await self._session.exec(query)).all()

    async def forget_chunks(self, stored_before_us: int, limit: int) -> int:
        """Removes chunks that a block took over before then; answers how many."""
        old = select(ChunkRow.job_id, ChunkRow.first_sequence).where(col(ChunkRow.stored_us) < stored_before_us)
        by_job: dict[str, list[int]] = defaultdict(list)
        for job_id, first in (await self._session.exec(old.order_by(col(ChunkRow.stored_us)).limit(limit))).all():
            by_job[job_id].append(first)
        for job_id, firsts in by_job.items():
            mine = (col(ChunkRow.job_id) == job_id, col(ChunkRow.first_sequence).in_(firsts))
            await self._session.exec(delete(ChunkRow).where(*mine))
        return sum(len(firsts) for firsts in by_job.values())

    async def newest_block_us(self) -> int | None:
        """When a block was last recorded."""
        return (await self._session.exec(select(func.max(BlockRow.stored_us)))).one()

    async def parts(self, after_key: str, since_us: int, limit: int) -> list[Part]:
        """Objects recorded since then, in the order of their keys."""
        end = func.max(col(BlockRow.offset_bytes) + col(BlockRow.length_bytes))
        first, last = func.min(BlockRow.first_sequence), func.max(BlockRow.last_sequence)
        columns: Any = (BlockRow.key, BlockRow.job_id, first, last, end)
        query = (
            select(*columns)
            .where(col(BlockRow.stored_us) >= since_us, col(BlockRow.key) > after_key)
            .group_by(col(BlockRow.key), col(BlockRow.job_id))
            .order_by(col(BlockRow.key))
            .limit(limit)
        )
        return [Part(*row) for row in (await self._session.exec(query)).all()]

    async def chunks_of(self, part: Part) -> Sequence[ChunkRow]:
        """The chunks that went into this object, as far as they are still there."""
        within = col(ChunkRow.first_sequence).between(part.first_sequence, part.last_sequence)
        query = select(ChunkRow).where(col(ChunkRow.job_id) == part.job_id, within)
        return (await self._session.exec(query.order_by(col(ChunkRow.first_sequence)))).all()

    async def blocks(self, job_id: str, after: int, limit: int) -> Sequence[BlockRow]:
        """Blocks with lines beyond `after`, in order."""
        query = (
            select(BlockRow)
            .where(col(BlockRow.job_id) == job_id, col(BlockRow.last_sequence) > after)
            .order_by(col(BlockRow.first_sequence))
            .limit(limit)
        )
        return (await self._session.exec(query)).all()

    async def compact(self, job_id: str, key: str, blocks: Sequence[Block], now_us: int) -> int:
        """These blocks, which are in the object store, take their chunks over; answers how many bytes those have."""
        await self.add_blocks(job_id, key, blocks, now_us)
        first, last = blocks[0].first_sequence, blocks[-1].last_sequence
        mine = (col(ChunkRow.job_id) == job_id, col(ChunkRow.first_sequence).between(first, last))
        taken = select(func.sum(func.length(ChunkRow.body))).where(*mine)
        taken_bytes: int = (await self._session.exec(taken)).one() or 0
        await self._session.exec(update(ChunkRow).where(*mine).values(stored_us=now_us))
        return taken_bytes

    async def replace_blocks(self, job_id: str, key: str, blocks: Sequence[Block], now_us: int) -> None:
        """The object has been written anew."""
        await self._session.exec(delete(BlockRow).where(col(BlockRow.job_id) == job_id, col(BlockRow.key) == key))
        await self.add_blocks(job_id, key, blocks, now_us)

    async def add_blocks(self, job_id: str, key: str, blocks: Sequence[Block], now_us: int) -> None:
        rows = [
            {
                "job_id": job_id,
                "first_sequence": block.first_sequence,
                "last_sequence": block.last_sequence,
                "key": key,
                "offset_bytes": block.offset,
                "length_bytes": block.length,
                "stored_us": now_us,
            }
            for block in blocks
        ]
        await self._session.exec(insert(BlockRow), params=rows)

    async def to_keep(self, after_id: str, live_bytes: int, limit: int) -> Sequence[LogRow]:
        """Logs whose job has ended, and live ones with more than `live_bytes` in the database, in the order of their
        ids."""
        ended = select(LogRow).where(col(LogRow.state) == ENDED)
        heavy = select(LogRow).where(col(LogRow.live_bytes) > live_bytes, col(LogRow.state) == LIVE)
        rows: list[LogRow] = []
        for query in (ended, heavy):
            behind = query.where(col(LogRow.id) > after_id).order_by(col(LogRow.id)).limit(limit)
            rows += (await self._session.exec(behind)).all()
        return sorted(rows, key=lambda row: row.id)[:limit]

    async def live(self, after_id: str, limit: int) -> Sequence[LogRow]:
        """Logs whose job has not ended as far as we know, in the order of their ids."""
        query = select(LogRow).where(col(LogRow.state) == LIVE, col(LogRow.id) > after_id)
        return (await self._session.exec(query.order_by(col(LogRow.id)).limit(limit))).all()

    async def live_chunks(self) -> int:
        query = select(func.count()).select_from(ChunkRow).where(col(ChunkRow.stored_us).is_(None))
        return (await self._session.exec(query)).one()

    async def forget_sources(self, job_id: str) -> None:
        for table in (SourceRow, AttemptRow, HeldRow):
            await self._session.exec(delete(table).where(col(table.job_id) == job_id))


class StorageUnit(UnitOfWork):
    def __init__(self, session: AsyncSession, skeleton: Skeleton, source: str, now: datetime) -> None:
        super().__init__(session, skeleton, source, now)
        self.filesets = Filesets(session)
        self.logs = Logs(session)

    async def save_log(self, row: LogRow, values: dict[str, Any]) -> None:
        """Compare-and-swap, after which `row` shows what was saved without being read again."""
        await self.swap(LogRow, row.id, row.revision, values)
        for name, value in (values | {"revision": row.revision + 1}).items():
            set_committed_value(row, name, value)


def fileset_of(row: FilesetRow) -> Fileset:
    """The row as the contract shows it."""
    return Fileset(
        id=row.id,
        team_id=row.team_id,
        project_id=row.project_id,
        kind=row.kind,
        state=row.state,
        digest=row.digest,
        file_count=row.file_count,
        size_bytes=row.size_bytes,
        job_id=row.job_id,
        attempt=row.attempt,
        created_at=from_us(row.created_us),
        sealed_at=from_us(row.sealed_us) if row.sealed_us else None,
        revision=row.revision,
    )
