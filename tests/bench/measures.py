"""The platform's own figures, each with the promise that is made about it."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from nabla.objects import JobTemplate, LogLine
from services import SERVICES
from tests.bench.reference import RayJobs
from tests.support.platform import Platform

BIN = Path(sys.executable).parent
RUNS = 100
IDLE_S = 20.0

Row = dict[str, object]


def promise(text: str, measured: str, holds: bool) -> Row:
    return {"promise": text, "measured": measured, "holds": holds}


def up(platform: Platform, ray_start_s: float) -> Row:
    """From the command until the front door answers, and until the first node is ready."""
    added = platform.node_ready_s - ray_start_s
    return {
        "gateway_s": round(platform.front_door_s, 2),
        "node_ready_s": round(platform.node_ready_s, 2),
        "ray_start_s": round(ray_start_s, 2),
        "promises": [
            promise("the gateway answers within 5 s", f"{platform.front_door_s:.1f} s", platform.front_door_s <= 5),
            promise("`nabla up` adds at most 5 s to what Ray takes", f"{added:+.1f} s", added <= 5),
        ],
    }


def latency(platform: Platform, ray: RayJobs, slurm_s: Sequence[float]) -> Row:
    """From sending the POST (no workspace to upload, command `echo`) to the line at an SSE subscriber."""
    with platform.client() as client:
        project, _ = client.projects.ensure("bench")
        times = [_one_echo(client, project.id) for _ in range(RUNS + 3)][3:]
    p50, reference = statistics.median(times), ray.p50_s
    p99 = statistics.quantiles(times, n=100, method="inclusive")[-1]
    tail = promise("p99 at most 4 times the p50", f"{p99 / p50:.1f} times", p99 <= 4 * p50)
    return {
        "p50_ms": round(p50 * 1000, 1),
        "p95_ms": round(statistics.quantiles(times, n=20)[-1] * 1000, 1),
        "p99_ms": round(p99 * 1000, 1),
        "slurm_sbatch_p50_ms": round(statistics.median(slurm_s) * 1000) if slurm_s else None,
        "runs": RUNS,
        "ray_job_submit_p50_ms": round(reference * 1000),
        "ratio": round(p50 / reference, 4),
        "promises": [
            promise("p50 at most 1/20 of ray job submit's", f"1/{reference / p50:.0f}", p50 <= reference / 20),
            *_beside_slurm(p50, slurm_s),
            tail,
        ],
    }


def _beside_slurm(p50: float, slurm_s: Sequence[float]) -> list[Row]:
    if not slurm_s:
        return []
    sbatch = statistics.median(slurm_s)
    return [promise("p50 at most 1/20 of Slurm's sbatch", f"1/{sbatch / p50:.0f}", p50 <= sbatch / 20)]


def _one_echo(client: object, project_id: str) -> float:
    from nabla import Client

    assert isinstance(client, Client)
    began, seen = time.monotonic(), 0.0
    job = client.jobs.submit(project_id, JobTemplate(name="echo", command=("echo", "hello from nabla")))
    for event in client.jobs.watch(job.id):
        if isinstance(event, LogLine) and event.text == "hello from nabla":
            seen = time.monotonic() - began
    assert seen, f"job {job.id} ended without its line"
    # One at a time: what the platform still does for an ended job is not part of the next one's latency.
    time.sleep(0.3)
    return seen


def command_line(platform: Platform) -> Row:
    """What a command costs before it does anything."""
    times = {}
    for label, arguments in (("help", ["--help"]), ("jobs_list", ["jobs", "list", "--json"])):
        runs = [_timed([str(BIN / "nabla"), *arguments], platform) for _ in range(8)]
        times[label] = statistics.median(runs)
    start = times["help"]
    return {
        **{f"{label}_ms": round(value * 1000) for label, value in times.items()},
        "promises": [promise("the command's own start stays under 200 ms", f"{start * 1000:.0f} ms", start < 0.2)],
    }


def _timed(command: list[str], platform: Platform) -> float:
    began = time.monotonic()
    subprocess.run(command, env=platform.environment, check=True, capture_output=True, timeout=60)
    return time.monotonic() - began


def idle(platform: Platform) -> Row:
    """Memory (PSS: shared pages counted once) and CPU of everything, with nothing to do."""
    time.sleep(5)
    processes = {name: _family(pid) for name, pid in platform.children().items()}
    before = {name: sum(map(_cpu, family)) for name, family in processes.items()}
    threading.Event().wait(IDLE_S)
    rows = {}
    for name, family in processes.items():
        pss = sum(process.memory_full_info().pss for process in family if process.is_running())
        cpu = (sum(map(_cpu, family)) - before[name]) / IDLE_S
        rows[name] = {"pss_mb": round(pss / 1e6, 1), "cpu_percent_of_a_core": round(cpu * 100, 2)}
    memory = sum(rows[name]["pss_mb"] for name in SERVICES)
    cpu = sum(rows[name]["cpu_percent_of_a_core"] for name in SERVICES)
    return {
        "processes": rows,
        "services_pss_mb": round(memory, 1),
        "services_cpu_percent_of_a_core": round(cpu, 2),
        "promises": [
            promise("the six services idle under 800 MB", f"{memory:.0f} MB", memory < 800),
            promise("and under 3 % of a core", f"{cpu:.2f} %", cpu < 3),
        ],
    }


def _family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
