"""The watchdog ends a process that only looks alive, and leaves a healthy one alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from libs.common.watchdog import EXIT_CODE

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import asyncio, sys, time
from libs.common.watchdog import Watchdog

async def main():
    connected = sys.argv[1] != "away"
    watchdog = Watchdog(lambda: connected, lag_s=0.3, away_s=0.6, look_s=0.05)
    running = asyncio.create_task(watchdog.run())
    await asyncio.sleep(0.2)
    if sys.argv[1] == "blocked":
        time.sleep(30)
    await asyncio.sleep(1.2 if sys.argv[1] != "away" else 30)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    if sys.argv[1] == "stopped":
        time.sleep(0.8)
    print("alive")

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("blocked", EXIT_CODE, "the event loop has not run for 0.3 s"),
        ("away", EXIT_CODE, "no connection to NATS for 0.6 s"),
        ("healthy", 0, "alive"),
        ("stopped", 0, "alive"),
    ],
)
def test_it_ends_what_only_looks_alive(what: str, code: int, said: str) -> None:
    began = time.monotonic()
    command = [sys.executable, "-c", PROGRAM, what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=25, check=False)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert time.monotonic() - began < 20
