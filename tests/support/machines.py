"""A second machine of a platform, in a network namespace: joined by the printed command, and cut off from power."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.links import Link
from tests.support.platform import Platform

LEAVE_S = 90


@dataclass(frozen=True)
class Machine:
    """A node whose every process has its folder's name in its environment, or is a child of one that had."""

    home: Path
    link: Link

    def lose_power(self) -> None:
        """The link is cut and every process killed at once, jobs' sandboxes included: nobody is told anything."""
        self.link.cut()
        deadline = time.monotonic() + 20
        while found := self.processes():
            assert time.monotonic() < deadline, found
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def processes(self) -> list[int]:
        """Those that name the folder; the sandboxes of jobs die with their shims, which do."""
        mark = str(self.home).encode()
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and _names(int(name), mark)]


def _names(pid: int, mark: bytes) -> bool:
    with contextlib.suppress(OSError):
        return any(mark in Path(f"/proc/{pid}/{file}").read_bytes() for file in ("environ", "cmdline"))
    return False


@contextmanager
def joined(platform: Platform, link: Link, home: Path, *options: str) -> Iterator[Machine]:
    """Runs the command of `nabla node token` at the other end of the link; the node leaves at the end.

    Args:
        options: of that command, such as "--gpus", "4".
    """
    made = platform.command("node", "token")
    assert made.returncode == 0, made.stderr
    joining = f"{made.stdout.strip()} {shlex.join(['--home', str(home), '--environment', sys.prefix, *options])}"
    path = f"PATH={Path(sys.executable).resolve().parent}:/usr/bin:/bin"
    inside = [*link.inside, "env", "-i", path, "HOME=/root", "sh", "-c", joining]
    try:
        done = subprocess.run(inside, capture_output=True, text=True, timeout=180, check=False, cwd="/")
        assert done.returncode == 0, done.stdout + done.stderr
        yield Machine(home, link)
    finally:
        leaving = [sys.executable, str(home / "code/infra/node/node.py"), "leave", str(home), "--now"]
        subprocess.run(leaving, capture_output=True, timeout=LEAVE_S, check=False)
