"""Pages in a real browser over owners that fail when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

pytest.importorskip("playwright", reason="Playwright is not installed: it comes with infra/locks/dev.txt")

from playwright.sync_api import Page, expect

from libs.common.contracts.messages import GetJob, GetLog, Job, JobDetail, LogLine, LogPage
from libs.common.errors import Unavailable
from services.gateway.http.parts import SESSION
from services.gateway.server import bound
from tests.support.browser import CHROMIUM, HINT, running_browser
from tests.unit.gateway.fakes import MEMBER_TOKEN, TEAM, World, new_world

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"Chromium is not installed: {HINT}"),
]


@dataclass
class Served:
    """A gateway with fake owners at an address, and a signed-in page of it."""

    world: World
    address: str
    page: Page


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    world = new_world(tmp_path)
    listener = bound("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(world.app, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with running_browser() as browser:
            context = browser.new_context()
            address = f"http://localhost:{port}"
            context.add_cookies([{"name": f"{SESSION}_{port}", "value": MEMBER_TOKEN, "url": address}])
            page = context.new_page()
            page.set_default_timeout(30_000)
            yield Served(world, address, page)
            context.close()
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()


def test_a_log_goes_on_after_the_gateway_has_answered_with_an_error(served: Served) -> None:
    job = Job(id="js1", team_id=TEAM, state="running", revision=1)
    lines = tuple(LogLine(sequence=number, text=f"line {number}") for number in (1, 2, 3))
    asked: list[GetJob] = []

    def answer(question: GetJob) -> JobDetail:
        asked.append(question)
        # The page itself, then the stream: a browser gives up for good on an answer that is an error.
        if len(asked) in (2, 3):
            raise Unavailable("service_silent", "The scheduler starts again.", "Try again.")
        return JobDetail(job=job)

    def log(question: GetLog) -> LogPage:
        found = tuple(line for line in lines if line.sequence > question.after)
        return LogPage(lines=found, complete=False, last_sequence=3)

    served.world.owners.answers |= {GetJob: answer, GetLog: log}
    served.page.goto(f"{served.address}/runs/js1")
    expect(served.page.locator("#lines > div")).to_have_count(3, timeout=30_000)
    assert len(asked) >= 4
