"""Secrets: written, listed by name and deleted. No route answers a value."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from libs.common.contracts.messages import (
    CheckSecrets,
    DeleteSecret,
    JobTemplate,
    ListSecrets,
    Principal,
    Secret,
    SecretPage,
    SetSecret,
)
from libs.common.secret_refs import is_name, names_in
from services.gateway.http.bodies import Body
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import API, Caller, Cursor, Knows, Limit, Ref, Wired, Word, answers_again
from services.gateway.http.projects import ProjectRef, resolve_active, resolve_id
from services.gateway.ports import Owners

router = APIRouter(prefix=API, tags=["secrets"], responses=RESPONSES)


class NewSecret(Body):
    value: Annotated[str, Field(max_length=1_000_000, repr=False, examples=["hf_..."])]
    project_id: ProjectRef = ""


async def check_secrets(owners: Owners, caller: Principal, project_id: str, template: JobTemplate) -> None:
    """Refuses a job that could not start; one that is deleted meanwhile is met at the start.

    Raises:
        NotFound: the project and its team have no secret by a name that the template has.
    """
    # The scheduler tells what is wrong with the others.
    names = tuple(sorted(filter(is_name, names_in(template))))
    if names:
        await owners.ask(CheckSecrets(project_id=project_id, names=names), SecretPage, caller)


@router.put("/secrets/{name}", summary="Set a secret of the team, or of a project")
async def set_secret(name: Ref, body: NewSecret, caller: Caller, parts: Wired) -> Secret:
    """By nature idempotent: the value that it has already changes nothing."""
    project_id = body.project_id and (await resolve_active(parts.owners, caller, body.project_id)).id
    message = SetSecret(project_id=project_id, name=name, value=body.value)
    return await parts.owners.ask(message, Secret, caller)


@router.get("/secrets", summary="Names of the team's secrets, and of a project's when one is named; newest first")
async def list_secrets(
    caller: Caller, parts: Wired, project_id: Word = "", cursor: Cursor = "", limit: Limit = 50
) -> SecretPage:
    project = await resolve_id(parts.owners, caller, project_id)
    return await parts.owners.ask(ListSecrets(project_id=project, cursor=cursor, limit=limit), SecretPage, caller)


@router.delete("/secrets/{name}", summary="Delete a secret: jobs that start later and name it are refused")
@answers_again(DeleteSecret, Secret)
async def delete_secret(*, name: Ref, caller: Caller, once: Knows, parts: Wired, project_id: Word = "") -> Secret:
    project = await resolve_id(parts.owners, caller, project_id)
    return await parts.owners.ask(DeleteSecret(project_id=project, name=name), Secret, caller, once=once)
