"""A real Traefik for tests, watching a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port, wait_for_port

BINARY = Path(sys.executable).parent / "traefik"


@dataclass(frozen=True)
class Traefik:
    """Where the running proxy listens, and the folder that it watches."""

    port: int
    api_port: int
    dynamic: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"


@contextmanager
def running_traefik(folder: Path) -> Iterator[Traefik]:
    """Started with an empty configuration, stopped at the end whatever happens."""
    proxy = Traefik(free_port(), free_port(), folder / "dynamic")
    proxy.dynamic.mkdir(parents=True)
    options = [
        f"--entrypoints.web.address=127.0.0.1:{proxy.port}",
        f"--entrypoints.traefik.address=127.0.0.1:{proxy.api_port}",
        "--api.insecure=true",
        f"--providers.file.directory={proxy.dynamic}",
        "--providers.file.watch=true",
        "--providers.providersthrottleduration=100ms",
        "--global.checknewversion=false",
        "--global.sendanonymoususage=false",
    ]
    log = (folder / "traefik.log").open("ab")
    process = subprocess.Popen([str(BINARY), *options], stdout=log, stderr=log)
    try:
        wait_for_port(proxy.port)
        wait_for_port(proxy.api_port)
        yield proxy
    finally:
        process.terminate()
        process.wait(20)
