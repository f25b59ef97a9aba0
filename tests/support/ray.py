"""A real Ray head on this machine, on free ports, with a token, every process of it ended at the end."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.executor.adapters.attempts import processes
from tests.support.leftovers import take_walls_down
from tests.support.ports import free_port

START_LIMIT_S = 60
AGENT = b"RayNodeAgent"
# One for all clusters of this process: Ray's driver reads it once in a process's life.
TOKEN = secrets.token_hex(32)
FAKE_HEAD = "f" * 51 + "00000"
NODE_MARK = "NABLA_TEST_NODE"


@dataclass
class RayHead:
    """The head and this process's token for it."""

    port: int
    folder: Path
    environment: dict[str, str]
    host: str = "127.0.0.1"
    cpus: int = 4
    gpus: int = 2
    options: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def start(self) -> None:
        loopback = "services.executor.adapters.cluster.loopback"
        command = [*self.inside, sys.executable, "-m", loopback, "start", "--head", f"--port={self.port}"]
        command += [
            f"--node-ip-address={self.host}",
            f"--num-cpus={self.cpus}",
            f"--num-gpus={self.gpus}",
            "--include-dashboard=false",
        ]
        command += [f"--temp-dir={self.folder}", "--disable-usage-stats", *self.options]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=START_LIMIT_S, cwd="/")

    def join(
        self,
        name: str,
        *,
        cpus: int = 2,
        gpus: int = 0,
        labels: Mapping[str, str] | None = None,
        address: str = "127.0.0.1",
        inside: Sequence[str] = (),
    ) -> RayNode:
        """Another node of this cluster on this machine: a raylet of its own, with a folder of its own for its agent.

        Args:
            inside: what to put before its command, to run it in a network namespace.
        """
        node_dir = self.folder.parent / name
        node = RayNode(self, name, node_dir, cpus, gpus, dict(labels or {}), address, tuple(inside))
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
            socket.create_connection((self.host, self.port), 1.0).close()
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
    address: str = "127.0.0.1"
    inside: tuple[str, ...] = ()

    def start(self) -> None:
        self.node_dir.mkdir(exist_ok=True)
        command = [*self.inside, sys.executable, "-m", "services.executor.adapters.cluster.loopback", "start"]
        command += [f"--address={self.head.address}"]
        command += [f"--node-ip-address={self.address}", f"--num-cpus={self.cpus}", f"--num-gpus={self.gpus}"]
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
def running_ray(
    host: str = "127.0.0.1", *, gpus: int = 2, inside: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Iterator[RayHead]:
    """Args: inside: what to put before its command, as for nodes; variables: more of its environment."""
    with ended_afterwards() as (folder, environment):
        own = environment | dict(variables or {})
        head = RayHead(free_port(), folder / "r", own, host, gpus=gpus, inside=tuple(inside))
        try:
            head.start()
            yield head
        finally:
            head.stop()


@contextmanager
def autoscaling_ray(worker: Mapping[str, float], most: int, idle_minutes: float) -> Iterator[RayHead]:
    """A head without room, whose autoscaler starts nodes of one kind on this machine, as Ray's own tests have it.

    Not by `ray.cluster_utils.AutoscalingCluster`, which begins and ends with all of Ray's processes on the machine.

    Args:
        most: how many nodes it may start.
        idle_minutes: after which it takes a node away.
    """
    with ended_afterwards() as (folder, environment):
        port = free_port()
        types = {
            "worker": {"resources": dict(worker), "node_config": {}, "min_workers": 0, "max_workers": most},
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        }
        provider = {
            # Named as an outsider's: the wheel has the provider, and not the defaults that its own name stands for.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "launch_multiple": True,
            "disable_node_updaters": True,
            "head_node_id": FAKE_HEAD,
        }
        config = {
            "cluster_name": "nabla",
            "max_workers": most,
            "idle_timeout_minutes": idle_minutes,
            "provider": provider,
            "available_node_types": types,
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands", "setup_commands")},
            **{name: [] for name in ("initialization_commands", "head_setup_commands", "worker_setup_commands")},
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
        }
        file = folder / "autoscaling.json"
        file.write_text(json.dumps(config))
        own = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD,
            "NABLA_NODE_DIR": str(folder / "node-{node_id}"),
        }
        options = (f"--autoscaling-config={file}",)
        head = RayHead(port, folder / "r", environment | own, cpus=0, gpus=0, options=options)
        try:
            head.start()
            yield head
        finally:
            head.stop()


@contextmanager
def ended_afterwards() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder for one cluster and the environment of its processes, with a token that this process has too.

    Whatever is started from it names the folder, and is ended by that.
    """
    folder = Path(tempfile.mkdtemp(prefix="nabla-ray-"))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    before = {name: os.environ.get(name) for name in token}
    os.environ.update(token)
    try:
        yield folder, _environment() | token
    finally:
        RayHead(0, folder, {}).stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        take_walls_down(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    """Workers start ten times slower where they may not keep compiled bytecode."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
