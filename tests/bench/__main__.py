"""`make bench`: speed and size of the platform, each beside its reference, measured in one run on one machine.

Absolute times belong to the machine; what is promised, and compared with the last committed results, are ratios.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from tests.bench import footprint, logs, measures
from tests.bench.reference import ray_jobs, slurm_echoes
from tests.support.platform import running_platform

RESULTS = Path(__file__).parent / "results.json"


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="nabla-bench-") as folder:
        reference, sbatch = ray_jobs(), slurm_echoes()
        # What the reference leaves behind is still being cleaned up by the kernel.
        time.sleep(5)
        with running_platform(Path(folder) / "home") as platform_under_test:
            found = {
                "up": measures.up(platform_under_test, reference.start_s),
                "latency": measures.latency(platform_under_test, reference.submit_s, sbatch),
                "command_line": measures.command_line(platform_under_test),
                "idle": measures.idle(platform_under_test),
                "log_follow": logs.follow(platform_under_test),
                "log_follow_beside_flood": logs.follow_beside_flood(platform_under_test),
                "log_throughput": logs.throughput(platform_under_test),
            }
        found["footprint"] = footprint.sleeping()
    results = {"machine": machine(), "at": datetime.now(UTC).isoformat(timespec="seconds"), **found}
    show(results)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(row["holds"] for row in promises(results)) else 1


def machine() -> dict[str, object]:
    import os

    return {"cpus": os.cpu_count(), "python": platform.python_version(), "kind": platform.machine()}


def promises(results: dict[str, object]) -> list[dict[str, object]]:
    return [row for group in results.values() if isinstance(group, dict) for row in group.get("promises", [])]


def show(results: dict[str, object]) -> None:
    print(json.dumps(results, indent=2))
    print()
    for row in promises(results):
        mark = "holds " if row["holds"] else "MISSED"
        print(f"  {mark}  {row['promise']}: {row['measured']}")
    print(f"\nwritten to {RESULTS}")


if __name__ == "__main__":
    sys.exit(main())
