"""Requests and queries about file sets. What asks the object store is a `prepare`: it runs before the transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from libs.common.clock import to_us
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    File,
    FilePage,
    Fileset,
    FilesetGrant,
    FilesetSealed,
    GetFileset,
    ListFiles,
    OpenFileset,
    Principal,
    SealFileset,
)
from libs.common.errors import Conflict, Forbidden, Invalid, NotFound, Unavailable
from libs.common.ids import new_id
from libs.common.pages import decode_cursor, encode_cursor, page_limit
from libs.common.store import Store
from libs.common.telemetry import meter
from services.storage.domain.filesets import (
    FILESET,
    KINDS,
    MAX_FILES,
    OPEN,
    SEALED,
    Entry,
    Verdict,
    checked_digest,
    entries_of,
    judge,
    object_key,
)
from services.storage.ports import ObjectStore, Signer
from services.storage.store import FileRow, FilesetRow, StorageUnit, fileset_of

# Of more files the client asks again once it has uploaded these.
GRANT_BYTES = 4 << 20
ATTEMPT_KINDS = ("artifacts", "model")

_sealed = meter().create_counter("nabla_filesets_sealed_total", description="File sets sealed, by kind")
_sealed_bytes = meter().create_counter("nabla_filesets_sealed_bytes_total", description="Bytes sealed, by kind")


@dataclass(frozen=True, slots=True)
class Opening:
    """What `open_fileset` will write down and answer.

    Args:
        known: the set that is there already, or empty for a new one under `fileset_id`.
    """

    request: OpenFileset
    fileset_id: str
    known: str
    entries: tuple[Entry, ...]
    uploads: tuple[File, ...]


class FilesetHandlers:
    def __init__(self, store: Store[StorageUnit], objects: ObjectStore, signer: Signer) -> None:
        self._store = store
        self._objects = objects
        self._signer = signer

    async def prepare_open(self, message: OpenFileset, call: Envelope) -> Opening:
        """Checks the request, looks for a set that has this content, and signs the URLs for what is missing."""
        request = allowed_opening(message, call.principal)
        entries = entries_of(request.files)
        digest = checked_digest(request.kind, request.digest, entries)
        request = request.model_copy(update={"digest": digest})
        if self._objects.problem:
            raise Unavailable(
                "object_store_unavailable",
                f"Nothing can be uploaded now: {self._objects.problem}",
                "Try again; if it stays, see `nabla status`.",
            )
        known = await self._reusable(request, entries, call.principal.team_id)
        if known and known.state == SEALED:
            return Opening(request, known.id, known.id, entries, ())
        fileset_id = known.id if known else new_id("fileset")
        missing: Sequence[Entry] = entries
        if known:
            verdict = await self._compare(request.kind, fileset_id, entries)
            missing = [entry for entry in entries if entry.number not in verdict.pins]
        uploads = await asyncio.to_thread(self._uploads, request, fileset_id, missing)
        return Opening(request, fileset_id, known.id if known else "", entries, uploads)

    async def open_fileset(self, message: OpenFileset, unit: StorageUnit, call: Envelope) -> FilesetGrant:
        """Writes the set down and answers where to put what is missing."""
        opening = call.facts
        assert isinstance(opening, Opening)
        await refuse_stale_attempt(unit, opening.request.job_id, opening.request.attempt, opening.request.kind)
        row = await unit.filesets.get(opening.known) if opening.known else await _added(unit, opening, call)
        if row is None or row.state not in (OPEN, SEALED):
            raise Conflict("fileset_gone", "The file set was removed as it was forgotten.", "Send it again.")
        if opening.known and row.state == OPEN:
            touched = {"touched_us": to_us(unit.now)}
            await unit.swap(FilesetRow, row.id, row.revision, touched)
            await unit.session.refresh(row)
        return FilesetGrant(fileset=fileset_of(row), uploads=() if row.state == SEALED else opening.uploads)

    async def prepare_seal(self, message: SealFileset, call: Envelope) -> dict[int, str]:
        """Looks whether every file has arrived whole; answers which object versions those are."""
        async with self._store.view() as view:
            row = await visible(view, message.fileset_id, call.principal, to_write=True)
            files = await view.filesets.files(row.id)
        if row.state != OPEN:
            return {}
        verdict = await self._compare(row.kind, row.id, [_entry(file) for file in files])
        refuse_incomplete(row.id, verdict)
        return dict(verdict.pins)

    async def seal_fileset(self, message: SealFileset, unit: StorageUnit, call: Envelope) -> Fileset:
        """Makes the set immutable: from now on it is exactly the versions that were checked."""
        pins = call.facts
        assert isinstance(pins, dict)
        row = await visible(unit, message.fileset_id, call.principal, to_write=True)
        await refuse_stale_attempt(unit, row.job_id, row.attempt, row.kind)
        state = FILESET.next_state(row.id, row.state, "seal")
        if state == row.state:
            return _unless_deleted(row)
        await unit.filesets.pin(row.id, list(pins.items()))
        await unit.swap(FilesetRow, row.id, row.revision, {"state": state, "sealed_us": to_us(unit.now)})
        await unit.session.refresh(row)
        fileset = fileset_of(row)
        await unit.emit(
            FilesetSealed(fileset=fileset),
            team_id=row.team_id,
            project_id=row.project_id,
            object_id=row.id,
            revision=row.revision,
            attempt=row.attempt,
        )
        _sealed.add(1, {"kind": row.kind})
        _sealed_bytes.add(row.size_bytes, {"kind": row.kind})
        return fileset

    async def get_fileset(self, message: GetFileset, view: StorageUnit, call: Envelope) -> Fileset:
        return fileset_of(await visible(view, message.fileset_id, call.principal))

    async def list_files(self, message: ListFiles, view: StorageUnit, call: Envelope) -> FilePage:
        """The files of a set, or of a job's newest sealed artifacts; a job that has none yet gives an empty page."""
        rows = await self._asked_for(message, view, call.principal)
        if not rows:
            return FilePage()
        limit, (rank, after) = page_limit(message.limit), _after(message.cursor)
        items: list[File] = []
        for row in rows:
            if row.rank < rank:
                continue
            room = limit - len(items)
            found = await view.filesets.files(row.id, after if row.rank == rank else -1, room + 1)
            items += await asyncio.to_thread(self._downloads, row, found[:room], message.endpoint)
            if len(found) > room:
                last = found[room - 1].number if room else -1
                more = encode_cursor(f"{row.rank}.{last + 1}")
                return FilePage(fileset=fileset_of(rows[0]), items=tuple(items), next_cursor=more)
        return FilePage(fileset=fileset_of(rows[0]), items=tuple(items))

    async def _asked_for(self, message: ListFiles, view: StorageUnit, asker: Principal) -> Sequence[FilesetRow]:
        """One set, or those of all ranks of a job."""
        if message.fileset_id:
            return [await visible(view, message.fileset_id, asker)]
        if not message.job_id:
            raise Invalid("fileset_or_job", "Neither a file set nor a job is named.", "Name one of them.")
        return [
            row for row in await view.filesets.newest_artifacts(asker.team_id, message.job_id) if may_see(row, asker)
        ]

    async def _reusable(self, request: OpenFileset, entries: Sequence[Entry], team_id: str) -> FilesetRow | None:
        """A sealed workspace of the team with this digest, or the same request's own set, still open or sealed."""
        async with self._store.view() as view:
            for row in await view.filesets.with_digest(team_id, request.kind, request.digest):
                if row.kind == "workspace" and row.state == SEALED:
                    return row
                same = (row.project_id, row.job_id, row.attempt, row.rank) == (
                    request.project_id,
                    request.job_id,
                    request.attempt,
                    request.rank,
                )
                if same and entries == tuple(_entry(file) for file in await view.filesets.files(row.id)):
                    return row
        return None

    async def _compare(self, kind: str, fileset_id: str, entries: Sequence[Entry]) -> Verdict:
        stored = await self._objects.versions(f"{kind}/{fileset_id}/") if entries else []
        return judge(kind, fileset_id, entries, stored)

    def _uploads(self, request: OpenFileset, fileset_id: str, missing: Iterable[Entry]) -> tuple[File, ...]:
        uploads: list[File] = []
        room = GRANT_BYTES
        for entry in missing:
            url = self._signer.put_url(request.endpoint, object_key(request.kind, fileset_id, entry.number))
            room -= len(url) + len(entry.path.encode()) + 200
            if room < 0:
                break
            uploads.append(_file(entry, url))
        return tuple(uploads)

    def _downloads(self, row: FilesetRow, files: Sequence[FileRow], endpoint: str) -> tuple[File, ...]:
        """Files with their URLs; those of an open set have none, as nobody has checked them yet."""

        def url(file: FileRow) -> str:
            if row.state != SEALED:
                return ""
            key = object_key(row.kind, row.id, file.number)
            return self._signer.get_url(endpoint, key, file.version, file.path.rsplit("/", 1)[-1])

        # What other ranks than the first left is beside what the first did, in folders of their own.
        folder = f"rank-{row.rank}/" if row.rank else ""
        entries = ((_entry(file), url(file)) for file in files)
        return tuple(_file(replace(entry, path=folder + entry.path), link) for entry, link in entries)


def allowed_opening(message: OpenFileset, asker: Principal) -> OpenFileset:
    """The request with what follows from who asks filled in.

    Raises:
        Invalid, Forbidden: the kind is unknown or not for this asker.
    """
    if message.kind not in KINDS:
        detail = f"There is no kind of file set called {message.kind[:40]!r}."
        raise Invalid("bad_kind", detail, f"Use one of {', '.join(KINDS)}.")
    if asker.kind == "attempt":
        message = _of_attempt(message, asker)
    if message.kind == "artifacts":
        if asker.kind == "user":
            detail = "The artifacts of a job are written by the job itself."
            raise Forbidden("artifacts_of_job", detail, "Write to /artifacts in the job, or upload a model.")
        if not message.job_id or message.attempt < 1:
            raise Invalid("no_attempt", "Artifacts need their job and attempt.", "Send job_id and attempt.")
    if not message.project_id:
        raise Invalid("no_project", "The file set belongs to no project.", "Send project_id.")
    return message


def _of_attempt(message: OpenFileset, asker: Principal) -> OpenFileset:
    own = {"project_id": asker.project_id, "job_id": asker.job_id, "attempt": asker.attempt}
    foreign = [name for name, value in own.items() if getattr(message, name) not in ("", 0, value)]
    if message.kind not in ATTEMPT_KINDS or foreign:
        detail = "A running job may upload artifacts and models of its own attempt, nothing else."
        raise Forbidden("not_of_this_attempt", detail, "Use a person's token.")
    return message.model_copy(update=own)


def may_see(row: FilesetRow, asker: Principal, *, to_write: bool = False) -> bool:
    if row.team_id != asker.team_id:
        return False
    if asker.kind != "attempt":
        return True
    if to_write:
        return (row.job_id, row.attempt) == (asker.job_id, asker.attempt) and row.kind in ATTEMPT_KINDS
    return row.project_id == asker.project_id


async def visible(unit: StorageUnit, fileset_id: str, asker: Principal, *, to_write: bool = False) -> FilesetRow:
    """The set.

    Raises:
        NotFound: it is not there, or this asker may not know of it.
    """
    row = await unit.filesets.get(fileset_id)
    if row is None or not may_see(row, asker, to_write=to_write):
        raise NotFound("fileset_not_found", f"There is no file set {fileset_id[:60]!r}.", "Check the id.")
    return row


def refuse_incomplete(fileset_id: str, verdict: Verdict) -> None:
    """Raises Conflict or Invalid, naming the first file that is missing or wrong."""
    if verdict.wrong:
        entry, found = verdict.wrong[0]
        detail = (
            f"{entry.path!r} was uploaded with {found.size_bytes} bytes and MD5 {found.etag}; announced were "
            f"{entry.size_bytes} bytes and MD5 {entry.md5}. {len(verdict.wrong)} file(s) are wrong."
        )
        raise Invalid("file_wrong", detail, "Open the file set again and upload what it answers.", path=entry.path)
    if verdict.missing:
        path = verdict.missing[0].path
        detail = f"{path!r} has not arrived; {len(verdict.missing)} file(s) of {fileset_id} are missing."
        raise Conflict("file_missing", detail, "Open the file set again and upload what it answers.", path=path)


async def refuse_stale_attempt(unit: StorageUnit, job_id: str, attempt: int, kind: str) -> None:
    """Raises Conflict when a newer attempt of the job has begun: the attempt number fences late writers off."""
    if kind != "artifacts":
        return
    newest = await unit.logs.newest_attempt(job_id)
    if attempt < newest:
        detail = f"Attempt {attempt} of job {job_id} is over; attempt {newest} has begun."
        raise Conflict("stale_attempt", detail, "Nothing: the newer attempt writes the artifacts.")


async def _added(unit: StorageUnit, opening: Opening, call: Envelope) -> FilesetRow:
    request, now_us = opening.request, to_us(unit.now)
    row = FilesetRow(
        id=opening.fileset_id,
        team_id=call.principal.team_id,
        project_id=request.project_id,
        kind=request.kind,
        state=OPEN,
        digest=request.digest,
        file_count=len(opening.entries),
        size_bytes=sum(entry.size_bytes for entry in opening.entries),
        job_id=request.job_id,
        attempt=request.attempt,
        rank=request.rank,
        created_us=now_us,
        touched_us=now_us,
    )
    await unit.filesets.add(row, opening.entries)
    return row


def _unless_deleted(row: FilesetRow) -> Fileset:
    if row.state != SEALED:
        raise Conflict("fileset_gone", "The file set was removed as it was forgotten.", "Send it again.")
    return fileset_of(row)


def _entry(row: FileRow) -> Entry:
    return Entry(row.number, row.path, row.size_bytes, row.md5, row.sha256)


def _file(entry: Entry, url: str) -> File:
    return File(path=entry.path, size_bytes=entry.size_bytes, md5=entry.md5, sha256=entry.sha256, url=url)


def _after(cursor: str) -> tuple[int, int]:
    """The rank whose files are next, and the number of the file before them."""
    if not cursor:
        return 0, -1
    rank, _, number = decode_cursor(cursor).partition(".")
    if not (rank.isdecimal() and number.isdecimal()) or int(number) > MAX_FILES:
        raise Invalid("bad_cursor", "The cursor is not one that this API gave.", "Start without a cursor.")
    return int(rank), int(number) - 1
