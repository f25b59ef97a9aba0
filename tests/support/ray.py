"""A real Ray head on this machine, on free ports, with a token, every process of it ended at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.executor.adapters import processes
from tests.support.ports import free_port

START_LIMIT_S = 60
AGENT = b"RayNodeAgent"


@dataclass
class RayHead:
    """The head and this process's token for it."""

    port: int
    folder: Path
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        loopback = "services.executor.adapters.loopback"
        command = [sys.executable, "-m", loopback, "start", "--head", f"--port={self.port}"]
        command += ["--node-ip-address=127.0.0.1", "--num-cpus=4", "--num-gpus=2", "--include-dashboard=false"]
        command += [f"--temp-dir={self.folder}", "--disable-usage-stats"]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=START_LIMIT_S, cwd="/")

    def stop(self) -> None:
        """Ends every process of this head by its number: those that name its folder or its port, and their children."""
        deadline = time.monotonic() + 10
        while (found := self.processes()) and time.monotonic() < deadline:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def processes(self) -> list[int]:
        """Ray's own name this head's folder or address; workers rename themselves, and are their children."""
        marks = (str(self.folder).encode(), f"address={self.address}".encode())
        own = [pid for pid in _all_processes() if any(mark in _command_line(pid) for mark in marks)]
        return sorted({*own, *(child for pid in own for child in processes.descendants(pid))} - {os.getpid()})

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1.0).close()
        except OSError:
            return False
        return True

    def agents(self) -> list[int]:
        """The processes of all node agents, of whatever installation."""
        return list(self._named(AGENT))

    def agent_pid(self) -> int:
        """The process of the node agent's actor."""
        return next(self._named(AGENT))

    def gcs_pid(self) -> int:
        """The process that is the head's memory."""
        return next(self._named(b"/gcs_server"))

    def _named(self, mark: bytes) -> Iterator[int]:
        return (pid for pid in self.processes() if mark in _command_line(pid))


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@contextmanager
def running_ray() -> Iterator[RayHead]:
    folder = Path(tempfile.mkdtemp(prefix="nabla-ray-"))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    head = RayHead(free_port(), folder / "r", _environment() | token)
    before = {name: os.environ.get(name) for name in token}
    os.environ.update(token)
    try:
        head.start()
        yield head
    finally:
        head.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    """Workers start ten times slower where they may not keep compiled bytecode."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
