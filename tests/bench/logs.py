"""The log path: how many lines a second get from a print to the object store, and how soon a line is seen."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil

from nabla import Client
from nabla.objects import JobTemplate, LogLine, Resources
from tests.bench.measures import Row, promise
from tests.support.platform import Platform

LINES = 2_000_000
LINES_PER_S = 100_000
# About what a training loop prints.
FLOOD = f"seq -f 'step %.0f of {LINES}: loss 0.693147 accuracy 0.5081 learning rate 0.000300' {LINES}"
TICKS, TICKS_PER_S, NEIGHBOURS, SHARE = 1000, 100, 4, 0.2
TICKER = (
    "import time\n"
    f"for n in range({TICKS}):\n"
    f"    print('tick', time.time(), flush=True); time.sleep(1 / {TICKS_PER_S})\n"
)
# A job that prints as fast as is promised, for as long as the ticker ticks and a little longer.
LOUD = (
    "import sys, time\n"
    f"began, each = time.time(), {LINES_PER_S} // 100\n"
    f"for n in range(100 * {TICKS // TICKS_PER_S + 5}):\n"
    "    time.sleep(max(0, began + n / 100 - time.time()))\n"
    "    sys.stdout.write(f'tick {time.time()} loss 0.693147 accuracy 0.5081 rate 0.0003\\n' * each)\n"
    "    sys.stdout.flush()\n"
)
FOLLOW_P99_S = 0.2
PATIENCE_S = 180.0


def throughput(platform: Platform) -> Row:
    """From the first line's time to the moment when the object store has the last one of them."""
    with platform.client() as client:
        project, _ = client.projects.ensure("bench")
        peak = _Peak(platform)
        with peak:
            job = client.jobs.submit(project.id, JobTemplate(name="flood", command=("sh", "-c", FLOOD)))
            stored_at = _until_stored(client, job.id)
        first = client.jobs.log_page(job.id, 0, 10)
        began = next(line.at for line in first.lines if line.stream == "stdout" and line.at)
        took_s = stored_at - began.timestamp()
        last = client.jobs.log_page(job.id, -3, 3).lines
    whole = any(line.text.startswith(f"step {LINES} of") for line in last)
    rate = LINES / took_s
    holds = whole and rate >= LINES_PER_S
    return {
        "lines": LINES,
        "whole": whole,
        "seconds": round(took_s, 2),
        "lines_per_s": round(rate),
        "peak_rss_mb": peak.found,
        "promises": [promise("100,000 lines/s from one job to the object store", f"{rate:,.0f} lines/s", holds)],
    }


def _until_stored(client: Client, job_id: str) -> float:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        page = client._transport.get(f"/jobs/{job_id}/logs", {"after": -1, "limit": 1})
        if page["sealed"] and page["last_sequence"] > LINES:
            return time.time()
        time.sleep(0.05)
    raise TimeoutError(f"the log of {job_id} was not whole after {PATIENCE_S:.0f} s")


class _Peak:
    """The most memory that each of our processes was seen to have."""

    def __init__(self, platform: Platform) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in platform.children().items() if name != "ray"}
        self.found: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.2):
            for name, process in self._processes.items():
                self.found[name] = max(self.found.get(name, 0.0), round(process.memory_info().rss / 1e6, 1))


def follow(platform: Platform) -> Row:
    """From print to follower, while a few other jobs print as much."""
    with platform.client() as client:
        project, _ = client.projects.ensure("bench")
        small = JobTemplate(
            name="ticker", command=("python3", "-u", "-c", TICKER), resources=Resources(cpu_count=SHARE)
        )
        others = [client.jobs.submit(project.id, small) for _ in range(NEIGHBOURS)]
        job = client.jobs.submit(project.id, small)
        late = _lateness(client, job.id)
        for other in others:
            client.jobs.stop(other.id)
    return _follow_row("a line is seen within 200 ms (p99)", late, TICKS)


def follow_beside_flood(platform: Platform) -> Row:
    """The same for a quiet job beside one that prints 100,000 lines/s, and for the lines of that one.

    Each is followed by a process of its own: one that decodes a flood sees the other's lines late by its own fault.
    """
    with platform.client() as client, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        project, _ = client.projects.ensure("bench")
        loud, quiet = (
            client.jobs.submit(
                project.id,
                JobTemplate(name=name, command=("python3", "-u", "-c", code), resources=Resources(cpu_count=SHARE)),
            )
            for name, code in (("loud", LOUD), ("ticker", TICKER))
        )
        loud_late = pool.submit(_lateness_from_outside, platform.url, platform.token, loud.id)
        late = _lateness(client, quiet.id)
        expected = LINES_PER_S * (TICKS // TICKS_PER_S + 5)
        beside = _follow_row("beside 100,000 lines/s of another job a line is seen within 200 ms (p99)", late, TICKS)
        own = _follow_row("and so is each of those", loud_late.result(PATIENCE_S), expected)
    return {"quiet": beside, "loud": own, "promises": [*_promises(beside), *_promises(own)]}


def _promises(row: Row) -> list[Row]:
    made = row.pop("promises")
    assert isinstance(made, list)
    return made


def _lateness_from_outside(url: str, token: str, job_id: str) -> list[float]:
    with Client(url, token) as client:
        return _lateness(client, job_id)


def _lateness(client: Client, job_id: str) -> list[float]:
    """Seconds from the print of each line, which says when that was, until it is here."""
    return [
        time.time() - float(event.text.split()[1])
        for event in client.jobs.watch(job_id)
        if isinstance(event, LogLine) and event.text.startswith("tick")
    ]


def _follow_row(text: str, late: list[float], expected: int) -> Row:
    p50, p99 = statistics.median(late), statistics.quantiles(late, n=100)[-1]
    holds = p99 < FOLLOW_P99_S and len(late) == expected
    return {
        "lines": len(late),
        "p50_ms": round(p50 * 1000, 1),
        "p99_ms": round(p99 * 1000, 1),
        "promises": [promise(text, f"{p99 * 1000:.0f} ms", holds)],
    }
