"""`make bench`: speed and size of the platform, each beside its reference, measured in one run on one machine.

Absolute times belong to the machine; what is promised, and shown beside the last committed results, are ratios and
bounds. It takes less than ten minutes, on a machine that should do nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from tests.bench import containers, footprint, logs, measures
from tests.bench.reference import ray_jobs, slurm_echoes
from tests.support.platform import running_platform

RESULTS = Path(__file__).parent / "results.json"
PROMISE_CHARACTERS = 62

T = TypeVar("T")


class Progress:
    """Says what is measured, and how long it took."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def __call__(self, what: str, measure: Callable[[], T]) -> T:
        began_s = time.monotonic()
        print(f"{began_s - self._began_s:5.0f} s  {what} ... ", end="", flush=True)
        found = measure()
        print(f"{time.monotonic() - began_s:.1f} s", flush=True)
        return found


def main() -> int:
    load_before, step = os.getloadavg()[0], Progress()
    with tempfile.TemporaryDirectory(prefix="nabla-bench-") as folder:
        reference = step("reference: ray job submit", ray_jobs)
        sbatch = step("reference: Slurm's sbatch", slurm_echoes)
        # What the references leave behind is still being cleaned up by the kernel.
        time.sleep(5)
        with running_platform(Path(folder) / "home") as running:
            found = {
                "up": measures.up(running, reference.start_s),
                "latency": step("from submit to first line", lambda: measures.latency(running, reference, sbatch)),
                "command_line": step("the command line", lambda: measures.command_line(running)),
                "idle": step("the idle platform", lambda: measures.idle(running)),
                "log_follow": step("following a log", lambda: logs.follow(running)),
                "log_follow_beside_flood": step("beside a flood", lambda: logs.follow_beside_flood(running)),
                "log_throughput": step("a flood of lines", lambda: logs.throughput(running)),
            }
        found["containers"] = step("containers beside podman's own", containers.beside_podman)
        found["footprint"] = step("sleeping jobs", footprint.sleeping)
    results = {"machine": machine(load_before), "at": datetime.now(UTC).isoformat(timespec="seconds"), **found}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(table(promises(results), promises(committed()))))
    print(f"\nAll figures are in {RESULTS}.")
    return 0 if all(row["holds"] for row in promises(results)) else 1


def machine(load_before: float) -> dict[str, object]:
    """Args: load_before: the load average of the last minute before the first measurement."""
    kind, cpus = platform.machine(), os.cpu_count()
    return {"cpus": cpus, "python": platform.python_version(), "kind": kind, "load_before": round(load_before, 2)}


def committed() -> dict[str, Any]:
    """The results of the last commit; nothing where there is no repository."""
    command = ["git", "show", f"HEAD:./{RESULTS.name}"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def promises(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for group in results.values() if isinstance(group, dict) for row in group.get("promises", [])]


def table(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """One line a promise: whether it holds, what was measured, and what the committed results say."""
    was = {row["promise"]: row["measured"] for row in before}
    lines = ["", f"          {'promise':<{PROMISE_CHARACTERS}}  {'now':>16}  {'committed':>16}"]
    for row in now:
        mark, text = "holds " if row["holds"] else "MISSED", row["promise"]
        lines.append(f"  {mark}  {text:<{PROMISE_CHARACTERS}}  {row['measured']:>16}  {was.get(text, '-'):>16}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
