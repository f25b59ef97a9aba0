"""Which way bytes take between a node and the object store."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from services.executor.adapters.workspaces import transfer

pytestmark = pytest.mark.unit
CONTENT = b"weights"


class Asked(ThreadingHTTPServer):
    """A store, or a proxy: remembers what it was asked for, and answers everything."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.lines.append(f"{self.command} {self.path}")
                self.rfile.read(int(self.headers.get("Content-Length", "0")))
                self.send_response(200)
                self.send_header("Content-Length", str(len(CONTENT)))
                self.end_headers()
                self.wfile.write(CONTENT)

            def do_PUT(self) -> None:
                self.do_GET()

            def log_message(self, *_: Any) -> None:
                return

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture
def store() -> Iterator[Asked]:
    with Asked() as server:
        yield server


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Asked() as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
        yield server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_front_door_on_this_machine_is_never_asked_through_a_proxy(
    host: str, store: Asked, proxy: Asked, tmp_path: Path
) -> None:
    fetch(f"http://{host}:{store.port}/got")
    (tmp_path / "x").write_bytes(CONTENT)
    descriptor = os.open(tmp_path / "x", os.O_RDONLY)
    transfer.upload(f"http://{host}:{store.port}/put", descriptor, len(CONTENT))
    os.close(descriptor)
    assert (store.lines, proxy.lines) == (["GET /got", "PUT /put"], [])


def test_a_front_door_elsewhere_is_asked_as_the_machine_asks_everything(proxy: Asked) -> None:
    fetch("http://front.invalid/got")
    assert proxy.lines == ["GET http://front.invalid/got"]


def fetch(url: str) -> None:
    target = io.BytesIO()
    transfer.download(url, target, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert target.getvalue() == CONTENT
