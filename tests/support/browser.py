"""The system's Chromium, driven by Playwright; its own download of a browser is never used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
HINT = "apt-get install chromium"
QUIET = ("background-networking", "component-update", "sync", "gpu", "quic")
FLAGS = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]


@contextmanager
def running_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A page, and what went wrong on it."""

    page: Page
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def hosts(self) -> set[str]:
        urls = (urlsplit(request.url) for request in self.requests)
        return {url.netloc for url in urls if url.scheme in ("http", "https", "ws", "wss")}


def watched(context: BrowserContext) -> Watched:
    """A fresh page whose console errors, script errors and requests are noted."""
    found = Watched(context.new_page())
    found.page.set_default_timeout(20_000)

    def note(request: Request) -> None:
        # A function of our own: Playwright cannot call a list's method.
        found.requests.append(request)

    def complain(message: ConsoleMessage) -> None:
        if message.type == "error":
            found.complaints.append(message.text)

    found.page.on("request", note)
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.on("console", complain)
    return found


def sideways(page: Page) -> int:
    """How many pixels the page is wider than the screen."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
