"""What people would use instead, on the same machine in the same run: Ray's own Jobs API, and Slurm."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port
from tests.support.slurm import running_slurm, why_no_slurm

BIN = Path(sys.executable).parent
TRIES = 3
SLURM_TRIES, SLURM_PAUSE_S = 8, 3.5


@dataclass(frozen=True)
class RayJobs:
    """Seconds of `ray start --head`, and of each `ray job submit -- echo` from command to success."""

    start_s: float
    submit_s: tuple[float, ...]

    @property
    def p50_s(self) -> float:
        return statistics.median(self.submit_s)


def ray_jobs() -> RayJobs:
    folder = tempfile.mkdtemp(prefix="nray-", dir="/tmp")
    gcs, dashboard = free_port(), free_port()
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", "--node-ip-address=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", f"--temp-dir={folder}", "--object-store-memory=80000000"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    said = Path(folder) / "said"
    began = time.monotonic()
    with said.open("w") as output:
        head = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        _until_started(said)
        started = time.monotonic() - began
        tries = [_submit(environment) for _ in range(TRIES)]
        return RayJobs(started, tuple(tries))
    finally:
        head.terminate()
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, 9)
        shutil.rmtree(folder, ignore_errors=True)


def slurm_echoes() -> tuple[float, ...]:
    """Seconds of each `sbatch` from the command to the line in its file; none where there is no Slurm.

    With a pause before each, as its scheduler makes those wait that come close behind others.
    """
    if why := why_no_slurm():
        print(f"no reference of Slurm: {why}", file=sys.stderr)
        return ()
    with running_slurm() as slurm:
        times = []
        for number in range(SLURM_TRIES):
            time.sleep(SLURM_PAUSE_S)
            times.append(slurm.echo_s(number))
        return tuple(times)


def _until_started(said: Path, timeout_s: float = 90.0) -> None:
    """Until `ray start` itself says that the runtime has started, which is when without --block it returns."""
    deadline = time.monotonic() + timeout_s
    while "Ray runtime started" not in said.read_text():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Ray's reference head did not come up in {timeout_s:.0f} s")
        time.sleep(0.02)


def _submit(environment: dict[str, str]) -> float:
    command = [str(BIN / "ray"), "job", "submit", "--", "echo", "hello"]
    deadline = time.monotonic() + 90
    while True:
        began = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
        if done.returncode == 0:
            return time.monotonic() - began
        if time.monotonic() > deadline:
            raise RuntimeError(f"ray job submit failed: {done.stdout[-500:]} {done.stderr[-500:]}")
        time.sleep(1)
