"""The machines that jobs run on: how they are, taking them out of use, and letting new ones in."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, Field

from libs.common.contracts.messages import (
    AdmitNode,
    CheckNodeToken,
    CreateNodeToken,
    DrainNode,
    ListNodes,
    Node,
    NodeGrant,
    NodePage,
    NodeToken,
)
from libs.common.errors import Conflict, NotFound
from libs.common.ids import secret_hash
from services.gateway.adapters.bundle import bundle, join_script
from services.gateway.authentication import GATEWAY, refused
from services.gateway.domain.origins import is_own_machine
from services.gateway.http.bodies import Body
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import API, Bearer, Caller, Id, Knows, Parts, Wired

router = APIRouter(prefix=API, tags=["nodes"], responses=RESPONSES)
NODE_TOKEN = "nbln"


class NodeInvitation(BaseModel):
    command: str = Field(description="Run it on the machine that shall be a node. It is good once.")
    expires_at: datetime | None = None
    python_version: str = Field(description="What the machine must have.")
    ray_version: str


class NewNode(Body):
    hostname: Annotated[str, Field(max_length=255)] = ""


async def joiner_of(bearer: Bearer, parts: Wired) -> tuple[str, NodeToken]:
    """The ticket of a machine that is about to join, and what it is good for. The executor knows it by its hash.

    Raises:
        Unauthenticated.
    """
    if bearer is None or not bearer.credentials.startswith(f"{NODE_TOKEN}_"):
        raise refused("This needs a node token: `nabla node token` makes one.")
    question = CheckNodeToken(token_hash=secret_hash(bearer.credentials))
    return bearer.credentials, await parts.owners.ask(question, NodeToken, GATEWAY)


Joiner = Annotated[tuple[str, NodeToken], Depends(joiner_of)]


@router.get("/nodes", summary="The machines that jobs run on, and what is used of them")
async def list_nodes(caller: Caller, parts: Wired) -> NodePage:
    return await parts.owners.ask(ListNodes(), NodePage, caller)


@router.get("/nodes/join", summary="The program that makes a machine a node; needs a node token")
async def get_join_program(joiner: Joiner, request: Request) -> PlainTextResponse:
    ticket, versions = joiner
    url = f"{request.url.scheme}://{request.headers.get('host', '')}"
    return PlainTextResponse(join_script(url, ticket, versions.python_version, versions.ray_version))


@router.get("/nodes/bundle", summary="The code of a node; needs a node token")
async def get_bundle(joiner: Joiner) -> Response:
    return Response(await asyncio.to_thread(bundle), media_type="application/gzip")


@router.post("/nodes/admission", summary="Use a node token up: the answer is what a machine needs to join")
async def admit_node(body: NewNode, joiner: Joiner, parts: Wired) -> NodeGrant:
    # Without a key: the answer has a secret in it, and is not to be kept for a repeat.
    message = AdmitNode(token_hash=secret_hash(joiner[0]), hostname=body.hostname)
    return await parts.owners.ask(message, NodeGrant, GATEWAY)


@router.post("/nodes/tokens", status_code=201, summary="Let one machine in: the answer is the command to run there")
async def create_node_token(request: Request, caller: Caller, once: Knows, parts: Wired) -> NodeInvitation:
    url = outer_url(request, parts)
    ticket = parts.secrets.make(NODE_TOKEN, "node", caller.id, once.key)
    made = await parts.owners.ask(CreateNodeToken(token_hash=secret_hash(ticket)), NodeToken, caller, once=once)
    return NodeInvitation(
        command=joining_command(url, ticket, made.python_version),
        expires_at=made.expires_at,
        python_version=made.python_version,
        ray_version=made.ray_version,
    )


@router.get("/nodes/{node_id}", summary="One node")
async def get_node(node_id: Id, caller: Caller, parts: Wired) -> Node:
    return await _find(node_id, caller, parts)


@router.post("/nodes/{node_id}/drain", summary="Give the node no new work; it rests when what runs there has ended")
async def drain_node(node_id: Id, caller: Caller, once: Knows, parts: Wired) -> Node:
    return await parts.owners.ask(DrainNode(node_id=node_id), Node, caller, once=once)


@router.delete("/nodes/{node_id}/drain", summary="Use the node again")
async def undrain_node(node_id: Id, caller: Caller, once: Knows, parts: Wired) -> Node:
    return await parts.owners.ask(DrainNode(node_id=node_id, undo=True), Node, caller, once=once)


def joining_command(url: str, ticket: str, python_version: str) -> str:
    """By Python alone, as that must be there in any case; a refusal is printed as it came, with what to do."""
    door = urlsplit(url)
    kind = "HTTPSConnection" if door.scheme == "https" else "HTTPConnection"
    steps = (
        "import http.client as h",
        f"c=h.{kind}('{door.netloc}')",
        f"c.request('GET','{API}/nodes/join',headers={{'Authorization':'Bearer {ticket}'}})",
        "r=c.getresponse()",
        "exec(r.read() if r.status==200 else 'raise SystemExit(r.read().decode())')",
    )
    return f'python{python_version} -c "{"; ".join(steps)}"'


async def _find(node_id: str, caller: Caller, parts: Parts) -> Node:
    page = await parts.owners.ask(ListNodes(), NodePage, caller)
    for node in page.items:
        if node.id == node_id:
            return node
    raise NotFound("node_not_found", f"There is no node {node_id}.", "`nabla nodes list` shows them.")


def outer_url(request: Request, parts: Parts) -> str:
    """The front door as other machines reach it.

    Raises:
        Conflict: they do not.
    """
    if address := parts.settings.node_address:
        return f"http://{address}:{parts.settings.door_port}"
    host = request.headers.get("host", "")
    if is_own_machine(host):
        detail = f"No other machine reaches this front door, which you reach as {host}."
        remedy = 'Set host = "0.0.0.0" and node_address in nabla.toml to an address of this machine, and start again.'
        raise Conflict("door_closed", detail, remedy)
    return f"{request.url.scheme}://{host}"
