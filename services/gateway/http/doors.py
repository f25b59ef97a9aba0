"""Doors: tickets into running jobs. The bytes themselves go through the front door to the node, not through here."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field

from libs.common.contracts.messages import Door, OpenDoor
from services.gateway.http.bodies import Body
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import API, Caller, Id, Knows, Wired

router = APIRouter(prefix=API, tags=["jobs"], responses=RESPONSES)


class NewDoor(Body):
    kind: Literal["ssh", "tcp"]
    rank: Annotated[int, Field(ge=0, le=100_000)] = 0
    port: Annotated[int, Field(ge=0, le=65_535, description="tcp: the port inside the job.")] = 0
    public_key: Annotated[str, Field(max_length=2_000, description="ssh: as authorized_keys has it.")] = ""


@router.post("/jobs/{job_id}/doors", status_code=201, summary="A ticket into a running job")
async def open_door(job_id: Id, body: NewDoor, caller: Caller, once: Knows, parts: Wired) -> Door:
    message = OpenDoor(job_id=job_id, rank=body.rank, kind=body.kind, port=body.port, public_key=body.public_key)
    return await parts.owners.ask(message, Door, caller, once=once)
