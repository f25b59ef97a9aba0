"""The whole platform for end-to-end tests and benches: its own home, its own ports, gone without a trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.local.control import front_door_answers
from infra.local.installation import Installation, open_installation
from infra.local.settings import LocalSettings
from nabla import Client
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
NODE_TIMEOUT_S = 120.0


@dataclass
class Platform:
    """A running installation and how long it took to come up."""

    home: Path
    environment: dict[str, str]
    front_door_s: float = 0.0
    node_ready_s: float = 0.0
    # What `up` printed.
    said: str = ""

    @property
    def installation(self) -> Installation:
        return open_installation(LocalSettings(home=self.home))

    @property
    def url(self) -> str:
        return self.installation.front_door

    @property
    def token(self) -> str:
        return (self.home / "keys" / "api-token").read_text().strip()

    def client(self, patience_s: float = 60.0) -> Client:
        return Client(self.url, self.token, patience_s=patience_s)

    def command(
        self, *arguments: str, cwd: Path | None = None, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Runs the `nabla` command as a person would."""
        nabla = str(Path(sys.executable).parent / "nabla")
        return subprocess.run(
            [nabla, *arguments],
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def children(self) -> dict[str, int]:
        """Name -> pid of every server and service."""
        state = json.loads((self.home / "run" / "supervisor.json").read_text())
        return {str(name): int(pid) for name, pid in state["children"].items()}

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.children()[name], number)

    def up(self) -> None:
        """Starts it and waits for the front door and the first node."""
        began = time.monotonic()
        command = [sys.executable, "-m", "services", "up"]
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.said = done.stdout
        assert front_door_answers(self.installation)
        self.front_door_s = time.monotonic() - began
        self.wait_for_node()
        self.node_ready_s = time.monotonic() - began

    def wait_for_node(self) -> None:
        deadline = time.monotonic() + NODE_TIMEOUT_S
        with self.client() as client:
            while not any(node.state == "ready" for node in client.status().nodes):
                assert time.monotonic() < deadline, "no node became ready"
                time.sleep(0.1)

    def down(self) -> None:
        command = [sys.executable, "-m", "services", "down"]
        subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, timeout=180, check=False)


@contextmanager
def running_platform(home: Path, **settings: str) -> Iterator[Platform]:
    """A platform with `NABLA_*` settings, up and with a node; everything is stopped and removed at the end."""
    names = {key: value for key, value in os.environ.items() if not key.startswith("NABLA_")}
    names.pop("PYTHONDONTWRITEBYTECODE", None)
    chosen = {f"NABLA_{name.upper()}": value for name, value in settings.items()}
    config = str(home.parent / "config")
    own = {"NABLA_HOME": str(home), "NABLA_PORT": str(free_port()), "NABLA_CONFIG": config}
    platform = Platform(home, names | own | chosen)
    try:
        platform.up()
        yield platform
    finally:
        platform.down()
        # Logs stay for whoever looks into a failure; the stored objects are what is large, and ports are for others.
        shutil.rmtree(home / "data" / "objects", ignore_errors=True)
        (home / "ports.json").unlink(missing_ok=True)
