"""File sets: immutable trees of files. Bytes go between client and object store; here are only names and links."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from libs.common.contracts.messages import (
    File,
    FilePage,
    Fileset,
    FilesetGrant,
    GetFileset,
    ListFiles,
    OpenFileset,
    SealFileset,
)
from services.gateway.http.bodies import Body
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import API, Caller, Cursor, Id, Knows, Limit, Wired, answers_again, content_endpoint
from services.gateway.http.projects import ProjectRef, resolve_active

router = APIRouter(prefix=API, tags=["filesets"], responses=RESPONSES)

MAX_FILES = 50_000


class NewFile(Body):
    path: Annotated[str, Field(min_length=1, max_length=1024, examples=["workspace.tar.gz"])]
    size_bytes: Annotated[int, Field(ge=0)] = 0
    md5: Annotated[str, Field(max_length=64)] = ""
    sha256: Annotated[str, Field(max_length=64)] = ""


class NewFileset(Body):
    kind: Literal["workspace", "artifacts", "model"]
    project_id: ProjectRef = ""
    digest: Annotated[str, Field(max_length=64, description="SHA-256 over the sorted paths and file hashes.")]
    files: Annotated[tuple[NewFile, ...], Field(max_length=MAX_FILES)]
    job_id: Annotated[str, Field(max_length=64)] = ""
    attempt: Annotated[int, Field(ge=0)] = 0


@router.post("/filesets", status_code=201, summary="Open a file set; answers where to PUT each missing file")
@answers_again(OpenFileset, FilesetGrant)
async def open_fileset(body: NewFileset, request: Request, caller: Caller, once: Knows, parts: Wired) -> FilesetGrant:
    project = await resolve_active(parts.owners, caller, body.project_id)
    message = OpenFileset(
        kind=body.kind,
        project_id=project.id,
        digest=body.digest,
        files=tuple(File(**file.model_dump()) for file in body.files),
        job_id=body.job_id,
        attempt=body.attempt,
        endpoint=content_endpoint(request, parts),
    )
    return await parts.owners.ask(message, FilesetGrant, caller, once=once, timeout_s=15)


@router.post("/filesets/{fileset_id}/seal", summary="Check that every file has arrived, then make the set immutable")
async def seal_fileset(fileset_id: Id, caller: Caller, once: Knows, parts: Wired) -> Fileset:
    return await parts.owners.ask(SealFileset(fileset_id=fileset_id), Fileset, caller, once=once, timeout_s=30)


@router.get("/filesets/{fileset_id}", summary="One file set")
async def get_fileset(fileset_id: Id, caller: Caller, parts: Wired) -> Fileset:
    return await parts.owners.ask(GetFileset(fileset_id=fileset_id), Fileset, caller)


@router.get("/filesets/{fileset_id}/files", summary="Its files, each with a link that is valid for minutes")
async def list_files(
    *, fileset_id: Id, request: Request, caller: Caller, parts: Wired, cursor: Cursor = "", limit: Limit = 50
) -> FilePage:
    endpoint = content_endpoint(request, parts)
    message = ListFiles(fileset_id=fileset_id, cursor=cursor, limit=limit, endpoint=endpoint)
    return await parts.owners.ask(message, FilePage, caller)
