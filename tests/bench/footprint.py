"""What a running job costs its node beside its own command: the shim, its relays, the walls."""

from __future__ import annotations

import time
from collections import Counter

from services.executor.adapters.attempts import processes
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, FrontDoor
from tests.bench.measures import Row, promise
from tests.integration.executor.attempts import eventually, running_node, why_no_bwrap

JOBS = 500
COMMAND = "sleep"
DOOR = FrontDoor(8080, "127.0.0.1", 8080)


def sleeping() -> Row:
    """Memory (PSS: shared pages counted once) of 500 jobs that sleep behind their walls, less the command's own."""
    if why := why_no_bwrap():
        return {"skipped": why, "promises": []}
    with running_node() as node:
        began = time.monotonic()
        folders = [node.start([COMMAND, "1000"], front_door=[DOOR], cpu_count=0.1) for _ in range(JOBS)]
        for folder in folders:
            eventually(folder.read_started, "the start of the job")
        started_s = time.monotonic() - began
        by_name: Counter[str] = Counter()
        for folder in folders:
            by_name.update(_memory_of(folder))
        for folder in folders:
            folder.request_stop(0, "over")
        for folder in folders:
            node.end_of(folder)
    over_mb = sum(size for name, size in by_name.items() if name != COMMAND) / JOBS / 1e6
    return {
        "jobs": JOBS,
        "start_all_s": round(started_s, 1),
        "mb_a_job_over_the_command": round(over_mb, 2),
        "promises": [promise("500 sleeping jobs under 20 MB each over the command", f"{over_mb:.1f} MB", over_mb < 20)],
    }


def _memory_of(folder: AttemptFolder) -> Counter[str]:
    record = folder.read_shim()
    assert record is not None
    sizes: Counter[str] = Counter()
    for pid in (record.pid, *processes.descendants(record.pid)):
        sizes[processes.name_of(pid)] += processes.proportional_bytes([pid])
    return sizes
