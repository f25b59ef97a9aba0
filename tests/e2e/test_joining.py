"""A second machine becomes a node by one command, works, is drained and leaves: by a real link, from a bare folder."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.local import leftovers
from nabla.objects import Node
from tests.support.links import Link, linked_namespace, why_no_links
from tests.support.platform import Platform, running_platform

WHY_NOT = why_no_links()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.full,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]


@pytest.fixture
def link() -> Iterator[Link]:
    with linked_namespace() as made:
        yield made


@pytest.fixture
def platform(link: Link) -> Iterator[Platform]:
    with (
        tempfile.TemporaryDirectory(prefix="nabla-e2e-") as folder,
        running_platform(Path(folder) / "home", host="0.0.0.0", node_address=link.here, gpus="0") as running,
    ):
        yield running


def eventually(find: Callable[[], Node | None], what: str, limit_s: float = 90.0) -> Node:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := find():
            return found
        time.sleep(0.3)
    raise AssertionError(f"{what}: not within {limit_s} s")


def test_a_machine_joins_by_one_command_works_is_drained_and_leaves(platform: Platform, link: Link) -> None:
    with tempfile.TemporaryDirectory(prefix="nabla-joined-") as folder, platform.client() as client:
        home = Path(folder) / "node"
        made = platform.command("node", "token")
        assert made.returncode == 0, made.stderr
        command = made.stdout.strip()
        assert f"HTTPConnection('{link.here}:" in command
        options = ["--home", str(home), "--environment", sys.prefix, "--gpus", "4", "--cpus", "1"]
        joining = f"{command} {shlex.join(options)}"

        def join() -> subprocess.CompletedProcess[str]:
            inside = [
                *link.inside,
                "env",
                "-i",
                f"PATH={Path(sys.executable).resolve().parent}:/usr/bin:/bin",
                "HOME=/root",
            ]
            return subprocess.run(
                [*inside, "sh", "-c", joining], capture_output=True, text=True, timeout=180, check=False, cwd="/"
            )

        def far(state: str) -> Node | None:
            return next((n for n in client.nodes.list() if (n.address, n.state) == (link.there, state)), None)

        joined = join()
        try:
            assert joined.returncode == 0, joined.stdout + joined.stderr
            node = eventually(lambda: far("ready"), "the node")
            assert node.gpu_count == 4
            assert (home / "node" / "agent.lock").exists()
            # The ticket was good once.
            again = subprocess.run(
                [*link.inside, "sh", "-c", command], capture_output=True, text=True, timeout=60, check=False, cwd="/"
            )
            assert again.returncode != 0
            assert "nabla node token" in again.stderr

            # Only that node has GPUs; the job speaks with the front door from there.
            ran = platform.command(
                "run", "--gpus", "1", "--", "sh", "-c", "echo on $NABLA_NODE_ID > /artifacts/where", cwd=Path(folder)
            )
            assert ran.returncode == 0, ran.stdout + ran.stderr
            drained = platform.command("nodes", "drain", node.id[:12])
            assert drained.returncode == 0, drained.stderr
            eventually(lambda: far("resting"), "the rest of the drained node")
            left = platform.command("node", "leave", "--home", str(home))
            assert left.returncode == 0, left.stdout + left.stderr
            eventually(lambda: None if far("resting") else node, "the departure")
            assert not (home / "node.json").exists()
            assert leftovers.processes_of(home) == []
        finally:
            leaving = [sys.executable, str(home / "code/infra/node/node.py"), "leave", str(home), "--now"]
            subprocess.run(leaving, capture_output=True, timeout=90, check=False)
