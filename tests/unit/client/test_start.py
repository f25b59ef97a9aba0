"""What the command line loads before it does anything: each module here costs every start its share of 200 ms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .stub import JOB, Reply, StubServer

pytestmark = pytest.mark.unit

CLIENT = Path(__file__).parents[3] / "libs" / "client"
NEVER = {"asyncio", "concurrent.futures", "importlib.metadata", "pathspec", "typing_extensions", "urllib.request"}
# For requests, uploads, tables and other programs; help needs none of them.
NOT_FOR_HELP = {"email", "http.client", "rich", "socket", "ssl", "subprocess", "tarfile", "tempfile", "webbrowser"}

EVERY_HELP = """
import click, io, json, sys
before = set(sys.modules)
from nabla.cli import root
from nabla.cli.failures import guarded

def show(command, path):
    guarded(lambda: root.main([*path, "--help"], prog_name="nabla", standalone_mode=False))
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            if name not in ("up", "down"):  # theirs is the platform's
                show(command.get_command(ctx, name), [*path, name])

said, sys.stdout = sys.stdout, io.StringIO()
show(root, [])
print(json.dumps(sorted(set(sys.modules) - before)), file=said)
"""
ONE_COMMAND = """
import io, json, sys
before = set(sys.modules)
from nabla.cli import root
from nabla.cli.failures import guarded

said, sys.stdout = sys.stdout, io.StringIO()
code = guarded(lambda: root.main(sys.argv[1:], prog_name="nabla", standalone_mode=False))
print(json.dumps(sorted(set(sys.modules) - before)), file=said)
sys.exit(code)
"""


def loaded(code: str, *arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(CLIENT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_help_loads_nothing_that_it_does_not_need() -> None:
    assert loaded(EVERY_HELP) & (NEVER | NOT_FOR_HELP) == set()


def test_a_list_loads_only_what_a_request_needs(server: StubServer) -> None:
    server.on("GET", "/jobs", Reply(200, {"items": [JOB], "next_cursor": ""}))
    used = loaded(ONE_COMMAND, "jobs", "list", "--json")
    assert "http.client" in used
    assert used & (NEVER | {"rich", "subprocess", "tarfile", "tempfile", "webbrowser"}) == set()
