"""Machines that join: what they fetch, with which ticket, and what they are told."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

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
from libs.common.errors import Unauthenticated
from libs.common.ids import secret_hash
from services.gateway.adapters.bundle import bundle, join_script
from tests.unit.gateway.fakes import BEARER, World, new_world

pytestmark = pytest.mark.unit
TICKET = "nbln_ticket"
JOINING = {"Authorization": f"Bearer {TICKET}"}
VERSIONS = NodeToken(python_version="3.11", ray_version="2.60.0")


def check(question: CheckNodeToken) -> NodeToken:
    if question.token_hash != secret_hash(TICKET):
        raise Unauthenticated("node_token_invalid", "This node token is not one.", "Make a new one.")
    return VERSIONS


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = new_world(tmp_path, node_address="10.0.0.1")
    made.owners.answers |= {
        CheckNodeToken: check,
        CreateNodeToken: lambda _: VERSIONS,
        AdmitNode: lambda _: NodeGrant(ray_address="10.0.0.1:6379", ray_token="secret"),
        ListNodes: lambda _: NodePage(items=(Node(id="n1", hostname="gpu1"),)),
        DrainNode: lambda asked: Node(id=asked.node_id, draining=not asked.undo),
    }
    return made


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(world.app), base_url="http://10.0.0.1:8080") as client:
        yield client


async def test_the_command_to_join_names_the_outer_door_and_a_ticket_kept_as_a_hash(
    client: httpx.AsyncClient, world: World
) -> None:
    answer = await client.post("/api/v1/nodes/tokens", headers=BEARER, json={})
    command = answer.json()["command"]
    assert answer.status_code == 201
    assert command.startswith("python3.11 -c ")
    assert "HTTPConnection('10.0.0.1:8080')" in command
    ticket = command.split("Bearer ")[1].split("'")[0]
    assert [each.token_hash for each in world.owners.of(CreateNodeToken)] == [secret_hash(ticket)]


async def test_nobody_is_invited_through_a_door_on_loopback(tmp_path: Path) -> None:
    closed = new_world(tmp_path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(closed.app), base_url="http://127.0.0.1:8080") as client:
        answer = await client.post("/api/v1/nodes/tokens", headers=BEARER, json={})
    assert (answer.status_code, answer.json()["code"]) == (409, "door_closed")
    assert "node_address" in answer.json()["remedy"]


@pytest.mark.parametrize("headers", [{}, BEARER, {"Authorization": "Bearer nbln_other"}])
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "join"), ("GET", "bundle"), ("POST", "admission")], ids=["join", "bundle", "admission"]
)
async def test_without_a_good_ticket_there_is_neither_code_nor_admission(
    client: httpx.AsyncClient, world: World, headers: dict[str, str], method: str, path: str
) -> None:
    answer = await client.request(method, f"/api/v1/nodes/{path}", headers=headers, json={"hostname": "x"})
    assert answer.status_code == 401
    assert world.owners.of(AdmitNode) == []


async def test_a_machine_with_a_ticket_is_admitted_without_a_record_of_the_answer(
    client: httpx.AsyncClient, world: World
) -> None:
    answer = await client.post("/api/v1/nodes/admission", headers=JOINING, json={"hostname": "gpu1"})
    assert answer.json() == {"ray_address": "10.0.0.1:6379", "ray_token": "secret"}
    asked = next(each for each in world.owners.asked if isinstance(each.message, AdmitNode))
    assert asked.key == ""


async def test_the_join_program_is_whole_and_knows_where_it_came_from(client: httpx.AsyncClient) -> None:
    program = (await client.get("/api/v1/nodes/join", headers=JOINING)).text
    ast.parse(program, feature_version=(3, 7))
    assert f'"url": "http://10.0.0.1:8080", "ticket": "{TICKET}", "python": "3.11"' in program


async def test_the_bundle_is_code_and_nothing_else(client: httpx.AsyncClient) -> None:
    answer = await client.get("/api/v1/nodes/bundle", headers=JOINING)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as packed:
        names = set(packed.getnames())
        assert all(member.isfile() for member in packed)
    assert {"services/executor/adapters/cluster/ray_agent.py", "infra/node/node.py"} <= names
    assert {"infra/setup.py", "infra/install/__init__.py", "infra/install/environments.py"} <= names
    assert "libs/client/nabla/__init__.py" in names
    assert not [
        name for name in names if "/." in name or name.startswith((".", "tests", "docs")) or "__pycache__" in name
    ]
    assert answer.content == bundle()


@pytest.mark.parametrize(
    ("python", "ray", "said"),
    [
        ("2.7", "2.60.0", "The cluster runs Python 2.7, and this is "),
        ("", "0.1", "The cluster runs Python"),
    ],
)
def test_a_machine_of_another_version_is_told_before_anything_is_asked_of_ray(
    tmp_path: Path, python: str, ray: str, said: str
) -> None:
    """Against a door that does not exist: the first check needs none, and the second asks its own environment."""
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    program = join_script("http://127.0.0.1:9", TICKET, python or own, ray)
    if not python:
        program = program.replace('unpack(ask("GET", "/nodes/bundle"), code)', "")
    command = [sys.executable, "-", "--home", str(tmp_path / "home"), "--environment", sys.prefix]
    done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


async def test_nodes_are_listed_found_and_drained(client: httpx.AsyncClient) -> None:
    assert (await client.get("/api/v1/nodes", headers=BEARER)).json()["items"][0]["hostname"] == "gpu1"
    assert (await client.get("/api/v1/nodes/n1", headers=BEARER)).json()["id"] == "n1"
    assert (await client.get("/api/v1/nodes/n2", headers=BEARER)).status_code == 404
    assert (await client.post("/api/v1/nodes/n1/drain", headers=BEARER)).json()["draining"] is True
    assert not (await client.delete("/api/v1/nodes/n1/drain", headers=BEARER)).json()["draining"]
