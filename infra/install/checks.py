"""What `make check` runs: two at a time, each with its time."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from infra.install.machine import ROOT, child_environment
from infra.install.terminal import say


class Check(NamedTuple):
    name: str
    command: list[str]
    folder: Path


def checks() -> list[Check]:
    """Slowest first, so that two workers end together."""
    tool = ROOT / ".venv" / "bin"
    proto = ROOT / "proto"
    # `make test` has the same on PostgreSQL too.
    quick = ["tests/unit", "tests/contract", "-q", "-n", "3", "-m", "not postgres and not full"]
    found = [
        Check("tests", [str(tool / "python"), "-m", "pytest", *quick], ROOT),
        Check("types", [str(tool / "mypy")], ROOT),
        Check("architecture", [str(tool / "lint-imports")], ROOT),
        Check("lint", [str(tool / "ruff"), "check", "."], ROOT),
        Check("format", [str(tool / "ruff"), "format", "--check", "."], ROOT),
        Check("buf-lint", [str(tool / "buf"), "lint"], proto),
    ]
    released = sorted(proto.glob("*.binpb*"))
    if released:
        against = [str(tool / "buf"), "breaking", "--against", released[-1].name]
        found.append(Check("buf-breaking", against, proto))
    return found


def run_checks(chosen: list[Check]) -> int:
    from concurrent.futures import ThreadPoolExecutor, as_completed

    began, failed = time.monotonic(), []
    with ThreadPoolExecutor(max_workers=2) as pool:
        running = {pool.submit(run_check, each): each.name for each in chosen}
        for future in as_completed(running):
            name, (code, seconds, output) = running[future], future.result()
            say(f"  {'ok  ' if code == 0 else 'FAIL'}  {name:<14} {seconds:6.1f} s")
            if code:
                failed.append((name, output))
    for name, output in failed:
        say(f"\n--- {name} " + "-" * (100 - len(name)) + f"\n{output.rstrip()}")
    outcome = f"failed: {', '.join(name for name, _ in failed)}" if failed else "all passed"
    say(f"\n{len(chosen)} checks in {time.monotonic() - began:.1f} s, {outcome}.")
    return 1 if failed else 0


def run_check(check: Check) -> tuple[int, float, str]:
    began = time.monotonic()
    done = subprocess.run(
        check.command, cwd=check.folder, capture_output=True, text=True, env=child_environment(), check=False
    )
    return done.returncode, time.monotonic() - began, done.stdout + done.stderr
