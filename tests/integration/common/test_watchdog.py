"""The watchdog ends a process that only looks alive, and leaves a healthy one alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from libs.common.watchdog import EXIT_CODE

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
# Time goes on only when the program says so, and it waits for two looks of the loop in between: a busy machine
# makes it slow, never wrong.
PROGRAM = """
import asyncio, sys, time
from libs.common.watchdog import Watchdog

what, now, looks = sys.argv[1], 0.0, 0

def connected():
    global looks
    looks += 1
    return what != "away"

async def pass_(seconds):
    global now
    now += seconds
    seen = looks
    while looks < seen + 2:
        await asyncio.sleep(0.01)

async def main():
    global now
    watchdog = Watchdog(connected, lag_s=30, away_s=60, look_s=0.02, now=lambda: now)
    running = asyncio.create_task(watchdog.run())
    await pass_(20)
    if what == "blocked":
        now += 31
        time.sleep(60)
    for _ in range(10):
        await pass_(20)
    if what == "away":
        time.sleep(60)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    if what == "stopped":
        now += 1000
        time.sleep(0.5)
    print("alive")

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("blocked", EXIT_CODE, "the event loop has not run for 30 s"),
        ("away", EXIT_CODE, "no connection to NATS for 60 s"),
        ("healthy", 0, "alive"),
        ("stopped", 0, "alive"),
    ],
)
def test_it_ends_what_only_looks_alive(what: str, code: int, said: str) -> None:
    command = [sys.executable, "-c", PROGRAM, what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
