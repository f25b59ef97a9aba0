"""The web interface in a real browser: sign-in, pages that stay true by themselves, and the page to draw on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("playwright", reason="Playwright is not installed: it comes with infra/locks/dev.txt")

from playwright.sync_api import Browser, BrowserContext, expect

from nabla import Client
from nabla.objects import Deployment, Gang, JobTemplate, Resources, Role
from tests.support.browser import CHROMIUM, HINT, Watched, running_browser, sideways, watched
from tests.support.platform import Platform

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"Chromium is not installed: {HINT}"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def signed_in(platform: Platform, browser: Browser) -> Iterator[BrowserContext]:
    """A browser that went through a sign-in link."""
    with platform.client() as client:
        link = client.sign_in_link().url
    context = browser.new_context()
    context.new_page().goto(link)
    yield context
    context.close()


@pytest.fixture
def view(signed_in: BrowserContext, ui: str) -> Iterator[Watched]:
    """A page that must neither complain nor ask any host but ours."""
    found = watched(signed_in)
    yield found
    found.page.close()
    door = ui.removeprefix("http://localhost")
    assert found.complaints == []
    assert {host for host in found.hosts if not host.endswith(f"localhost{door}")} <= {f"127.0.0.1{door}"}


@pytest.fixture
def ui(platform: Platform) -> str:
    return platform.installation.ui


def test_a_sign_in_link_signs_in_once_and_not_twice(platform: Platform, client: Client, browser: Browser) -> None:
    link = client.sign_in_link().url
    first, second = browser.new_context(), browser.new_context()
    page = first.new_page()
    page.goto(link)
    expect(page).to_have_title("Projects · Nabla")
    again = second.new_page()
    answer = again.goto(link)
    assert answer is not None
    assert answer.status == 401
    expect(again.get_by_text("has been used")).to_be_visible()
    again.goto(f"{platform.installation.ui}/projects")
    expect(again).to_have_url(f"{platform.installation.ui}/sign-in")
    for context in (first, second):
        context.close()


def test_signed_out_every_page_leads_to_the_sign_in(browser: Browser, ui: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    for path in ("/", "/projects", "/runs", "/models", "/deployments", "/nodes", "/system"):
        page.goto(ui + path)
        expect(page).to_have_url(f"{ui}/sign-in")
    context.close()


def test_signing_out_ends_it(platform: Platform, client: Client, browser: Browser, ui: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(client.sign_in_link().url)
    page.get_by_role("button", name="Sign out").click()
    expect(page).to_have_url(f"{ui}/sign-in")
    page.goto(f"{ui}/projects")
    expect(page).to_have_url(f"{ui}/sign-in")
    context.close()


def test_from_the_projects_to_a_run_whose_log_comes_live(view: Watched, client: Client, project: str, ui: str) -> None:
    script = "for n in $(seq 1 9); do echo line $n; sleep 0.5; done; echo kept > $NABLA_ARTIFACTS/kept.txt"
    page = view.page
    page.goto(ui)
    expect(page).to_have_title("Projects · Nabla")
    page.get_by_role("link", name="end-to-end").first.click()
    expect(page).to_have_title("end-to-end · Nabla")
    job = client.jobs.submit(project, JobTemplate(name="slow-printer", command=(script,)))
    page.get_by_role("link", name="slow-printer").first.click()
    expect(page).to_have_title("slow-printer · Nabla")
    page.evaluate("window.sameDocument = true")
    lines, headline = page.locator("#lines"), page.locator("[data-live=headline] .state")
    expect(lines).to_contain_text("line 1")
    expect(headline).to_have_text("running")
    assert "line 9" not in (lines.text_content() or "")
    expect(lines).to_contain_text("line 9")
    expect(headline).to_have_text("succeeded")
    expect(page.get_by_role("link", name="kept.txt")).to_be_visible()
    assert page.evaluate("window.sameDocument") is True
    assert client.jobs.get(job.id).job.state == "succeeded"


def test_a_waiting_run_says_why_and_what_to_do(view: Watched, client: Client, project: str, ui: str) -> None:
    wish = JobTemplate(name="large", command=("true",), resources=Resources(memory_bytes=900 << 40))
    job = client.experiments.start(project, "large", wish).jobs[0]
    view.page.goto(f"{ui}/runs/{job.id}")
    expect(view.page.get_by_text("the largest node has")).to_be_visible()
    expect(view.page.get_by_text("ask for less")).to_be_visible()
    client.jobs.stop(job.id)


def test_a_run_shows_its_attempts_its_timeline_its_ranks_and_what_it_used(
    view: Watched, client: Client, project: str, ui: str
) -> None:
    gang = Gang("torch", (Role("worker", 2),))
    wish = JobTemplate(
        name="gang", command=('echo "I am $RANK"; sleep 4; exit 3',), gang=gang, resources=Resources(cpu_count=0.1)
    )
    job = client.experiments.start(project, "gang", wish).jobs[0]
    page = view.page
    page.goto(f"{ui}/runs/{job.id}")
    node = next(node for node in client.status().nodes if node.state == "ready")
    attempts, timeline = page.locator("[data-live=attempts]"), page.locator("[data-live=timeline]")
    expect(attempts.get_by_text("exited 3")).to_be_visible(timeout=60_000)
    expect(attempts.get_by_text(node.hostname)).to_be_visible()
    expect(timeline.get_by_text("failure")).to_be_visible()
    expect(page.locator("#usage-charts").get_by_text("system/cpu_percent", exact=True)).to_be_visible()
    lines = page.locator("#lines")
    expect(lines.get_by_text("I am 0")).to_be_visible()
    page.get_by_label("Rank").select_option("1")
    expect(lines.get_by_text("I am 1")).to_be_visible()
    expect(lines.get_by_text("I am 0")).to_be_hidden()


def wait_until(holds: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_nodes_are_shown_with_their_state_and_what_is_free(view: Watched, client: Client, ui: str) -> None:
    node = next(node for node in client.status().nodes if node.state == "ready")
    try:
        client.nodes.drain(node.id)
        wait_until(lambda: client.nodes.get(node.id).draining)
        view.page.goto(f"{ui}/nodes")
        row = view.page.get_by_role("row", name=node.hostname)
        expect(row.get_by_text(f"of {node.cpu_count:g}").first).to_be_visible()
        expect(row.get_by_text(re.compile("drain"))).to_be_visible()
    finally:
        client.nodes.undrain(node.id)
        wait_until(lambda: client.nodes.get(node.id).state == "ready")


def test_runs_models_and_deployments_are_listed(view: Watched, digits: Deployment, ui: str) -> None:
    page = view.page
    for path, title, link in (
        ("/runs", "Runs", "digits"),
        ("/models", "Models", "digits"),
        ("/deployments", "Deployments", digits.name),
    ):
        page.goto(ui + path)
        expect(page).to_have_title(f"{title} · Nabla")
        page.locator("table").get_by_role("link", name=link, exact=True).first.click()
        expect(page).to_have_title(f"{link} · Nabla")
    expect(page.locator("[data-live=headline] .state")).to_have_text("ready")


def test_the_deployed_model_answers_to_what_is_drawn(view: Watched, digits: Deployment, ui: str) -> None:
    page = view.page
    page.goto(f"{ui}/deployments/{digits.name}")
    page.get_by_role("link", name="Draw a digit").click()
    expect(page).to_have_title(f"Draw a digit for {digits.name} · Nabla")
    area = page.locator("#pad").bounding_box()
    assert area is not None
    middle = area["x"] + area["width"] / 2
    page.mouse.move(middle, area["y"] + 40)
    page.mouse.down()
    page.mouse.move(middle, area["y"] + area["height"] - 40, steps=20)
    page.mouse.up()
    expect(page.locator("#answer")).to_have_text(re.compile(r"^\d$"))
    expect(page.locator("#bars > div")).to_have_count(10)
    asked = [request for request in view.requests if request.url.endswith("/predict") and request.method == "POST"]
    assert [request.url for request in asked] == [f"http://{digits.name}.apps.localhost{ui[16:]}/predict"]


def test_the_session_goes_to_the_interface_alone(signed_in: BrowserContext, digits: Deployment, ui: str) -> None:
    view = watched(signed_in)
    port = ui.rpartition(":")[2]
    view.page.goto(f"{ui}/projects")
    view.page.goto(f"http://{digits.name}.apps.localhost:{port}/livez")
    view.page.goto(f"http://127.0.0.1:{port}/api/v1/health")
    sent = {
        request.url: request.all_headers().get("cookie", "")
        for request in view.requests
        if "favicon" not in request.url
    }
    assert {url.split("/")[2] for url, cookie in sent.items() if cookie} == {f"localhost:{port}"}
    assert len({url.split("/")[2] for url in sent}) == 3


@pytest.mark.parametrize("width", [360, 390])
def test_no_page_scrolls_sideways_on_a_phone(
    signed_in: BrowserContext, client: Client, digits: Deployment, ui: str, width: int
) -> None:
    job = next(iter(client.jobs.list(limit=1)))
    page = signed_in.new_page()
    page.set_viewport_size({"width": width, "height": 800})
    detail = (
        "/projects/digits",
        f"/runs/{job.id}",
        "/models/digits",
        "/deployments/digits",
        "/deployments/digits/draw",
    )
    for path in ("/projects", "/runs", "/models", "/deployments", "/nodes", "/system", *detail):
        page.goto(ui + path)
        assert sideways(page) <= 0, path
    page.close()
