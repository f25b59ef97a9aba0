"""The whole service over real NATS: uploads, logs, restarts and kills."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import pytest
import urllib3

from libs.common.bus import Bus
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    Attempt,
    File,
    FilePage,
    Fileset,
    FilesetGrant,
    GetLog,
    GetService,
    Job,
    JobStarting,
    JobSucceeded,
    ListFiles,
    LogFrame,
    LogLine,
    LogPage,
    OpenFileset,
    Principal,
    SealFileset,
    ServiceStatus,
)
from libs.common.contracts.subjects import stream_of, subject_for, tail_subject
from libs.common.errors import Forbidden, Invalid, Unavailable
from libs.common.ids import new_id
from libs.common.loglines import Slice
from tests.integration.storage.conftest import Installation

pytestmark = pytest.mark.integration
MEMBER = Principal(kind="user", id="u1", team_id="t1", role="member")
GATEWAY = Principal(kind="service", id="gateway", team_id="t1")


def a_file(path: str, body: bytes) -> File:
    md5, sha256 = hashlib.md5(body).hexdigest(), hashlib.sha256(body).hexdigest()
    return File(path=path, size_bytes=len(body), md5=md5, sha256=sha256)


async def until(question: Callable[[], Awaitable[bool]], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not await question():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.05)


async def publish(bus: Bus, message: Message, job_id: str = "js1") -> None:
    envelope = Envelope(
        id=new_id("event"),
        type=message.ROUTE.type,
        source="test",
        time=datetime.now(UTC),
        object_id=job_id,
        team_id="t1",
    )
    subject = subject_for(type(message), team="t1", object_id=job_id)
    await bus.publish_stored(stream_of(message.ROUTE), subject, envelope.headers(), message.to_wire())


def frame(first: int, *texts: str, last: bool = False) -> LogFrame:
    lines = tuple(LogLine(stream="stdout", text=text) for text in texts)
    return LogFrame(job_id="js1", attempt_id="at1", attempt=1, first_line=first, lines=lines, last=last)


def job(revision: int) -> Job:
    attempt = Attempt(id="at1", number=1)
    return Job(id="js1", team_id="t1", project_id="p1", revision=revision, attempt=attempt)


async def status(bus: Bus) -> ServiceStatus:
    return await bus.ask(GetService(), ServiceStatus, GATEWAY, service="storage")


async def page(bus: Bus, after: int = 0) -> LogPage:
    return await bus.ask(GetLog(job_id="js1", after=after), LogPage, MEMBER)


async def ready(bus: Bus) -> None:
    async def is_ready() -> bool:
        return (await status(bus)).ready

    await until(is_ready)


async def test_a_model_goes_up_is_sealed_and_comes_down(installation: Installation) -> None:
    body = b"weights" * 1000
    request = OpenFileset(kind="model", project_id="p1", files=(a_file("m/weights.bin", body),))
    async with installation.running() as running:
        await ready(running.asker)
        grant = await running.asker.ask(request, FilesetGrant, MEMBER, key="k1")
        (upload,) = grant.uploads
        seal = SealFileset(fileset_id=grant.fileset.id)
        assert urllib3.request("PUT", upload.url, body=b"wrong").status == 200
        with pytest.raises(Invalid, match=r"'m/weights\.bin' was uploaded with 5 bytes"):
            await running.asker.ask(seal, Fileset, MEMBER, key="k2")
        assert urllib3.request("PUT", upload.url, body=body).status == 200
        sealed = await running.asker.ask(seal, Fileset, MEMBER, key="k2")
        assert sealed.state == "sealed"
        assert urllib3.request("PUT", upload.url, body=b"evil").status == 200
        files = await running.asker.ask(ListFiles(fileset_id=sealed.id), FilePage, MEMBER)
        assert urllib3.request("GET", files.items[0].url).data == body
        again = await running.asker.ask(request, FilesetGrant, MEMBER, key="k3")
        assert (again.fileset, again.uploads) == (sealed, ())


async def test_the_rule_is_checked_before_anything_is_prepared(installation: Installation) -> None:
    viewer = MEMBER.model_copy(update={"role": "viewer"})
    async with installation.running() as running:
        with pytest.raises(Forbidden):
            await running.asker.ask(OpenFileset(kind="nonsense"), FilesetGrant, viewer)


async def test_a_log_is_followed_live_and_read_after_it_was_sealed(installation: Installation) -> None:
    heard: list[LogPage] = []

    async with installation.running() as running:
        await ready(running.asker)

        async def hear(message: object) -> None:
            heard.append(LogPage.from_wire(message.data))  # type: ignore[attr-defined]

        await running.asker.client.subscribe(tail_subject("t1", "js1"), cb=hear)
        await running.asker.client.flush()
        await publish(running.asker, JobStarting(job=job(1)))
        for start in range(0, 300, 3):
            await publish(running.asker, frame(start, *(f"line {n}" for n in range(start, start + 3))))
        await publish(running.asker, JobSucceeded(job=job(2)))
        await publish(running.asker, frame(300, last=True))

        async def sealed() -> bool:
            async with running.service.store.view() as view:
                row = await view.logs.get("js1")
                return row is not None and row.state == "sealed"

        await until(sealed)
        found = await page(running.asker)
        assert [line.text for line in found.lines] == [f"line {n}" for n in range(300)]
        assert found.complete
        lines = [line for page in heard for each in page.slices for line in Slice.from_message(each).lines()]
        assert [line.sequence for line in lines] == list(range(1, 301))
        assert heard[-1].complete


@pytest.mark.full
async def test_the_service_starts_and_keeps_logs_without_the_object_store(installation: Installation) -> None:
    installation.seaweed.stop()
    try:
        async with installation.running() as running:
            found = await status(running.asker)
            assert not found.ready
            assert "object store" in found.detail
            request = OpenFileset(kind="model", project_id="p1", files=(a_file("a", b"1"),))
            with pytest.raises(Unavailable, match="Nothing can be uploaded now"):
                await running.asker.ask(request, FilesetGrant, MEMBER)
            await publish(running.asker, JobStarting(job=job(1)))
            await publish(running.asker, frame(0, "a", "b", last=True))
            await publish(running.asker, JobSucceeded(job=job(2)))

            async def complete() -> bool:
                return (await page(running.asker)).complete

            await until(complete)
            installation.seaweed.start()
            await ready(running.asker)

            async def compacted() -> bool:
                async with running.service.store.view() as view:
                    return bool(await view.logs.blocks("js1", 0, 1))

            await until(compacted)
            assert [line.text for line in (await page(running.asker)).lines] == ["a", "b"]
    finally:
        if installation.seaweed.process is None:
            installation.seaweed.start()


async def test_lines_that_waited_in_the_bus_longer_than_patience_are_in_the_log(installation: Installation) -> None:
    """Storage hears of the job's end, and is away while the last frames come and for longer than it waits for them."""
    installation.settings = installation.settings.model_copy(update={"last_frame_patience_s": 0.5})
    async with installation.running() as running:
        await publish(running.asker, JobStarting(job=job(1)))
        await publish(running.asker, JobSucceeded(job=job(2)))

        async def ended() -> bool:
            async with running.service.store.view() as view:
                row = await view.logs.get("js1")
                return row is not None and row.state == "ended"

        await until(ended)
    asker = installation.nats.bus("world")
    await asker.start()
    texts = [f"line {number}" for number in range(400)]
    for number, text in enumerate(texts):
        await publish(asker, frame(number, text))
    await publish(asker, frame(len(texts), last=True))
    await asyncio.sleep(0.5)
    await asker.stop()
    async with installation.running() as running:

        async def complete() -> bool:
            return (await page(running.asker, len(texts))).complete

        await until(complete, 60)
        assert [line.text for line in (await page(running.asker)).lines] == texts


RUN = """
import asyncio
from libs.common.migrations import migrate
from services.storage.app import build

async def main():
    service = build()
    await migrate(service.store.writer, service.name)
    async with service.running():
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.chaos
@pytest.mark.parametrize(
    "fault",
    [
        # Comes again only when the bus has waited 30 s for its acknowledgement.
        pytest.param("storage.before_commit:3", marks=pytest.mark.full),
        pytest.param("storage.after_commit:3", marks=pytest.mark.full),
        pytest.param("storage.after_commit_before_ack:2", marks=pytest.mark.full),
        pytest.param("storage.after_publish:1", marks=pytest.mark.full),
        pytest.param("", marks=pytest.mark.full),
        "storage.after_block_write:1",
    ],
)
async def test_a_kill_between_any_two_steps_loses_and_doubles_nothing(installation: Installation, fault: str) -> None:
    """The process dies at the fault (or by SIGKILL) while frames come, and its successor finishes the work."""
    settings = installation.settings
    environment = {
        **os.environ,
        **{f"NABLA_{name.upper()}": str(value) for name, value in settings.model_dump(exclude_unset=True).items()},
    }

    def start(with_fault: str) -> subprocess.Popen[bytes]:
        log = (settings.home / "storage.log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-c", RUN], env={**environment, "NABLA_FAULT": with_fault}, stdout=log, stderr=log
        )

    async with installation.running() as running:
        await ready(running.asker)
    asker = installation.nats.bus("world")
    await asker.start()
    process = start(fault)
    try:
        await publish(asker, JobStarting(job=job(1)))
        for start_line in range(0, 60, 2):
            await publish(asker, frame(start_line, f"line {start_line}", f"line {start_line + 1}"))
            if start_line == 30:
                await asyncio.sleep(0.2)
        await publish(asker, frame(60, last=True))
        await publish(asker, JobSucceeded(job=job(2)))
        if not fault:
            await asyncio.sleep(1)
            process.send_signal(signal.SIGKILL)
        code = await asyncio.to_thread(process.wait, 30)
        assert code in (137, -signal.SIGKILL)
        process = start("")

        async def sealed() -> bool:
            try:
                return (await page(asker)).complete
            except Unavailable:
                return False

        await until(sealed, 60)
        found = await page(asker)
        assert [line.text for line in found.lines] == [f"line {n}" for n in range(60)]
        assert [line.sequence for line in found.lines] == list(range(1, 61))
    finally:
        process.kill()
        process.wait(10)
        await asker.stop()
