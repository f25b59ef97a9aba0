"""From the front door to a port of a job on another machine: a real Traefik, real TLS, and a real link between."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.adapters.doors.authority import DoorAuthority
from services.executor.adapters.doors.door_keeper import DoorKeeper, Keeper
from services.serving.adapters.health import HttpHealth, tls_context
from services.serving.adapters.traefik import TraefikFiles
from services.serving.domain.front import Base, Endpoint, NodeDoor, Nodes, Pass, front_config
from tests.integration.executor.attempts import eventually, started
from tests.integration.executor.netspaces import Machine, NodeOn, node_on, why_no_network
from tests.support.links import Link, linked_namespace
from tests.support.traefik import Traefik, running_traefik

WHY_NOT = why_no_network()
pytestmark = [pytest.mark.integration, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

KEY, NODE = bytes(range(32)), "Ab12" * 14
SERVER = """
import http.server
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"name of the job " * (100_000 if self.path == "/large" else 1)
        self.send_response(200)
        if self.path != "/until-the-end":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
for port in (9000, 9001):
    if not __import__("os").fork():
        http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
__import__("os").wait()
"""


class Linked(Machine):
    """The machine at the other end of a link, which is another's to make and remove."""

    def __init__(self, link: Link) -> None:
        self.name, self.path = link.name, f"/run/netns/{link.name}"
        self._servers = []


@dataclass(frozen=True)
class Far:
    """A node on another machine, with a job that listens on 9000, which it opened, and on 9001, which it did not."""

    link: Link
    machine: Linked
    node: NodeOn
    keeper: DoorKeeper
    job: AttemptFolder

    @property
    def nodes(self) -> Nodes:
        return Nodes((NodeDoor(NODE, self.keeper.address),), a_pass(KEY))

    def name_of(self, port: int) -> str:
        return self.keeper.address_of(self.job.path.name, port, 0)


def a_pass(key: bytes) -> Pass:
    private, authority = Ed25519PrivateKey.from_private_bytes(os.urandom(32)), DoorAuthority(key)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    text = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return Pass(authority.of_front_door(public), text, authority.certificate)


def serve_doors(keepers: list[Keeper]) -> None:
    """What the agent's loop does when somebody knocks."""
    for keeper in keepers:
        keeper._process = keeper._start(keeper._listener)


@pytest.fixture(scope="module")
def far() -> Iterator[Far]:
    with linked_namespace() as link:
        machine = Linked(link)
        with node_on(machine) as node:
            job = node.start(["python3", "-c", SERVER], expose_ports=[9000])
            started(job)
            keeper = machine.inside(lambda: DoorKeeper(link.there, KEY, NODE, node.path))
            machine.inside(lambda: serve_doors(keeper._keepers))
            try:
                yield Far(link, machine, node, keeper, job)
            finally:
                keeper.close()


@pytest.fixture(scope="module")
def traefik(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traefik]:
    with running_traefik(tmp_path_factory.mktemp("traefik")) as proxy:
        yield proxy


def base_of(traefik: Traefik) -> Base:
    return Base(traefik.url, "apps.localhost", "", "http://127.0.0.1:1", "nabla")


async def healthy(far: Far, port: int, shown: Pass) -> bool:
    health, nodes = HttpHealth(), replace(far.nodes, shown=shown)
    try:
        return await health.ready(nodes.backend_of(far.name_of(port)), shown)
    finally:
        await health.close()


async def test_the_front_door_reaches_what_a_job_on_another_machine_opened(far: Far, traefik: Traefik) -> None:
    files = TraefikFiles(traefik.dynamic, traefik.api, timeout_s=60)
    await files.publish(front_config(base_of(traefik), [Endpoint("digits", far.name_of(9000))], far.nodes))
    await files.close()
    async with httpx.AsyncClient(base_url=f"{traefik.url}/d/digits", trust_env=False, timeout=20) as client:
        await eventually_up(client)
        assert (await client.get("/x")).text == "name of the job "
        assert (await client.get("/until-the-end")).text == "name of the job "
        assert (await client.get("/large")).text == "name of the job " * 100_000
        body = os.urandom(4_000_000)
        answers = await asyncio.gather(*(client.post("/", content=body) for _ in range(4)))
        assert all(answer.content == body for answer in answers)


async def eventually_up(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(20):
        while (await client.get("/up")).status_code != 200:
            await asyncio.sleep(0.1)


async def test_a_replica_on_another_machine_is_asked_for_its_health_the_same_way(far: Far) -> None:
    await until_healthy(far)


async def until_healthy(far: Far) -> None:
    async with asyncio.timeout(20):
        while not await healthy(far, 9000, a_pass(KEY)):
            await asyncio.sleep(0.1)


async def test_nobody_reaches_a_port_that_the_job_did_not_open(far: Far) -> None:
    await until_healthy(far)
    assert not await healthy(far, 9001, a_pass(KEY))


async def test_who_has_another_installations_pass_is_a_stranger(far: Far) -> None:
    strange = replace(a_pass(bytes(32)), authority=DoorAuthority(KEY).certificate)
    assert not await healthy(far, 9000, strange)


async def test_who_poses_as_a_node_is_not_believed(far: Far) -> None:
    deceived = replace(a_pass(KEY), authority=DoorAuthority(bytes(32)).certificate)
    assert not await healthy(far, 9000, deceived)


def test_without_a_pass_there_is_no_way_to_the_door(far: Far) -> None:
    host, _, port = far.keeper.address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as plain:
        plain.sendall(b"GET /n/x/enter HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in all_of(plain)
    nobody = ssl.create_default_context(cadata=DoorAuthority(KEY).certificate)
    name = far.nodes.door_of(far.nodes.doors[0]).name
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        nobody.wrap_socket(plain, server_hostname=name) as tls,
        pytest.raises(ssl.SSLError, match=r"(?i)certificate required"),
    ):
        tls.recv(1000)


def all_of(connection: socket.socket) -> bytes:
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1000):
            said += piece
    return said


def test_the_door_is_behind_its_own_name(far: Far) -> None:
    host, _, port = far.keeper.address.rpartition(":")
    name = far.nodes.door_of(far.nodes.doors[0]).name
    with (
        socket.create_connection((host, int(port)), 30) as plain,
        tls_context(a_pass(KEY)).wrap_socket(plain, server_hostname=name) as tls,
    ):
        tls.sendall(b"GET /n/x/enter HTTP/1.1\r\nHost: x\r\n\r\n")
        assert tls.recv(4000).startswith(b"HTTP/1.1 426 ")


def test_a_node_without_a_pass_answers_503_and_never_without_tls(far: Far, traefik: Traefik) -> None:
    config = front_config(base_of(traefik), [Endpoint("digits", far.name_of(9000))], replace(far.nodes, shown=None))
    services = config["http"]["services"]
    assert services["d-digits"]["loadBalancer"]["servers"] == []
    assert services[f"n-{NODE}"]["loadBalancer"]["servers"] == []


async def test_the_name_of_an_ended_job_leads_nowhere(far: Far) -> None:
    job = far.node.start(["python3", "-c", SERVER], expose_ports=[9000])
    started(job)
    other = replace(far, job=job)
    await until_healthy(other)
    job.request_stop(0.0, "over")
    eventually(lambda: job.read_exit() is not None, "the end of the job")
    assert not await healthy(other, 9000, a_pass(KEY))


def test_the_next_agents_door_has_the_same_address(far: Far, tmp_path: Path) -> None:
    first = far.machine.inside(lambda: DoorKeeper(far.link.there, KEY, NODE, tmp_path))
    address = first.address
    first.close()
    second = far.machine.inside(lambda: DoorKeeper(far.link.there, KEY, NODE, tmp_path))
    assert second.address == address
    second.close()
