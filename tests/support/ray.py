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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.executor.adapters import processes
from tests.support.ports import free_port

START_LIMIT_S = 60
AGENT = b"RayNodeAgent"
NODE_MARK = "NABLA_TEST_NODE"


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

    def join(self, name: str, *, cpus: int = 2, gpus: int = 0, labels: Mapping[str, str] | None = None) -> RayNode:
        """Another node of this cluster on this machine: a raylet of its own, with a folder of its own for its agent."""
        node = RayNode(self, name, self.folder.parent / name, cpus, gpus, dict(labels or {}))
        node.start()
        return node

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


@dataclass
class RayNode:
    """A node beside the head, on the same machine: what it starts carries its mark."""

    head: RayHead
    name: str
    node_dir: Path
    cpus: int
    gpus: int
    labels: dict[str, str]

    def start(self) -> None:
        self.node_dir.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "services.executor.adapters.loopback", "start"]
        command += [f"--address={self.head.address}"]
        command += ["--node-ip-address=127.0.0.1", f"--num-cpus={self.cpus}", f"--num-gpus={self.gpus}"]
        command += ["--disable-usage-stats", "--object-store-memory=78643200"]
        if self.labels:
            command += ["--labels", ",".join(f"{key}={value}" for key, value in self.labels.items())]
        own = {"NABLA_NODE_DIR": str(self.node_dir), NODE_MARK: str(self.node_dir)}
        environment = self.head.environment | own
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=START_LIMIT_S, cwd="/")

    def processes(self) -> list[int]:
        """Raylet, workers and agent; jobs have an environment of their own."""
        mark = f"{NODE_MARK}={self.node_dir}".encode()
        return [pid for pid in _all_processes() if mark in _environment_of(pid)]

    def raylet_pid(self) -> int:
        return next(pid for pid in self.processes() if b"/raylet" in _command_line(pid).split(b"\0")[0])

    def agent_pid(self) -> int:
        return next(pid for pid in self.processes() if AGENT in _command_line(pid))

    def has_agent(self) -> bool:
        return any(AGENT in _command_line(pid) for pid in self.processes())

    def kill(self) -> None:
        """The raylet first, with SIGKILL; its workers notice and go, and nothing else is left of it."""
        deadline = time.monotonic() + 20
        while (found := self.processes()) and time.monotonic() < deadline:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment_of(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


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
