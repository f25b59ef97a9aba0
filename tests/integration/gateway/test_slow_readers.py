"""A client that opens a stream and does not read it, over a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from libs.common.contracts.messages import GetJob, GetLog, Job, JobDetail, LogLine, LogPage
from services.gateway.http import streams
from services.gateway.server import WebServer
from services.gateway.settings import GatewaySettings
from tests.unit.gateway.fakes import MEMBER_TOKEN, TEAM, World, new_world

pytestmark = pytest.mark.integration
LINES = 30_000
PATIENCE_S = 60


def a_long_log(question: GetLog) -> LogPage:
    numbers = range(question.after + 1, min(question.after + question.limit, LINES) + 1)
    lines = tuple(LogLine(sequence=number, text=f"{number} " + "x" * 1000) for number in numbers)
    return LogPage(lines=lines, complete=True, last_sequence=LINES)


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[World, WebServer]]:
    world = new_world(folder)
    job = Job(id="js1", team_id=TEAM, state="succeeded", revision=3)
    world.owners.answers |= {GetJob: lambda _: JobDetail(job=job), GetLog: a_long_log}
    server = WebServer(world.app, GatewaySettings(home=folder, http_host="127.0.0.1", http_port=0))
    await server.start()
    try:
        yield world, server
    finally:
        await server.stop()


async def opened(address: str, last_id: int) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, (host, int(port)))
    resume = f"Last-Event-ID: {last_id}\r\n" if last_id else ""
    request = (
        f"GET /api/v1/jobs/js1/logs/stream HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Authorization: Bearer {MEMBER_TOKEN}\r\n{resume}Connection: close\r\n\r\n"
    )
    await loop.sock_sendall(client, request.encode())
    return client


async def all_of(client: socket.socket) -> tuple[list[int], bool]:
    """The sequence numbers of the lines that came whole, and whether the end came."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    try:
        while piece := await loop.sock_recv(client, 1 << 20):
            received += piece
    except ConnectionResetError:
        pass
    whole = received.decode(errors="replace").split("\n\n")[:-1]
    events = [block for block in whole if "event: line" in block]
    numbers = [json.loads(block.split("data: ", 1)[1].split("\n")[0].split("\r")[0])["sequence"] for block in events]
    return numbers, any("event: end" in block for block in whole)


async def until_nobody_follows(world: World) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while world.hints.listeners:
            await asyncio.sleep(0.05)


async def test_a_client_that_does_not_read_is_cut_off_and_resumes_without_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "SEND_TIMEOUT_S", 0.5)
    async with serving(tmp_path) as (world, server):
        client = await opened(server.address, 0)
        async with asyncio.timeout(PATIENCE_S):
            while not world.hints.listeners:
                await asyncio.sleep(0.01)
        await until_nobody_follows(world)
        # What it does not read is not fetched: all that is held for it is what sockets hold.
        pages = len(world.owners.of(GetLog))
        assert 0 < pages < LINES / 1000 / 2
        numbers, ended = await all_of(client)
        client.close()
        assert not ended
        monkeypatch.setattr(streams, "SEND_TIMEOUT_S", PATIENCE_S)
        client = await opened(server.address, numbers[-1] if numbers else 0)
        rest, ended = await all_of(client)
        client.close()
        assert ended
        assert numbers + rest == list(range(1, LINES + 1))


async def test_the_connection_of_a_client_that_never_reads_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "SEND_TIMEOUT_S", 0.5)
    monkeypatch.setattr("services.gateway.server.UNREAD_S", 1)
    async with serving(tmp_path) as (world, server):
        client = await opened(server.address, 0)
        async with asyncio.timeout(PATIENCE_S):
            while server.connection_count == 0 or world.hints.listeners:
                await asyncio.sleep(0.05)
            while server.connection_count:
                await asyncio.sleep(0.05)
        client.close()
