"""The whole test suite, fastest suites first, with live progress and a closing table of what was skipped and why.

`python -m tests.run` is what `make test` calls after installing; `--full` adds what takes long, `--gpu` runs only
what needs a GPU. What Debian packages have and tests need is installed when this is root, else named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Run one after the other. Within a stage what takes longest starts first: two platforms, each in one worker, and
# the integration suites beside and after them.
STAGES = (("unit", "contract"), ("chaos", "e2e", "integration"))
# More than two cores can keep busy: most tests wait for servers.
WORKERS = 3
# Program (a glob) -> the package that has it.
SYSTEM = {
    "/usr/lib/postgresql/*/bin/initdb": "postgresql",
    "/usr/bin/chromium*": "chromium",
    "/usr/sbin/ip": "iproute2",
    "/usr/sbin/nft": "nftables",
    "/usr/bin/pasta": "passt",
    "/usr/bin/podman": "podman",
    "/usr/sbin/runc": "runc",
    "/usr/bin/newuidmap": "uidmap",
    "/usr/bin/git": "git",
    "/usr/bin/ssh": "openssh-client",
    "/usr/bin/rsync": "rsync",
}

FOR_CONTAINERS = {pattern: package for pattern, package in SYSTEM.items() if package in ("podman", "runc", "uidmap")}


@dataclass
class Outcome:
    """What one stage came to: for each suite its counts and the seconds of its tests, and why tests were skipped."""

    exit_code: int
    seconds: float
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    skips: dict[str, int] = field(default_factory=dict)


def main() -> int:
    # Started in the background of a script, this is deaf to SIGINT, and so would be all that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = parse()
    if arguments.gpu:
        install_system_packages(FOR_CONTAINERS)
        # One after the other: the machine's GPUs are there once.
        return close([run_stage(tuple(chain(*STAGES)), "gpu", arguments.rest, workers=1)], workers=1)
    install_system_packages(SYSTEM)
    marks = "not gpu" if arguments.full else "not gpu and not full"
    return close([run_stage(stage, marks, arguments.rest) for stage in STAGES])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="also what takes long")
    parser.add_argument("--gpu", action="store_true", help="only what needs a GPU")
    parser.add_argument("rest", nargs="*", help="passed on to pytest")
    return parser.parse_args()


def install_system_packages(wanted: Mapping[str, str]) -> None:
    """As root, installs the Debian packages that are missing; an ordinary user's tests skip with the same line."""
    missing = [package for pattern, package in wanted.items() if not list(Path("/").glob(pattern.lstrip("/")))]
    if not missing or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    print(f"── installing Debian packages: {' '.join(missing)}", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", *missing]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            print(f"   {' '.join(command)} failed; tests that need it are skipped:\n{done.stderr[-500:]}", flush=True)
            return


def run_stage(suites: Sequence[str], marks: str, rest: Sequence[str], workers: int = WORKERS) -> Outcome:
    print(f"\n══ {', '.join(suites)}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", *(f"tests/{suite}" for suite in suites), "-m", marks]
        command += ["-n", str(workers), "--no-loadscope-reorder"]
        command += ["-p", "tests.support.report", f"--report-file={report}", "--no-header", "--tb=short", "-q", *rest]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        found = json.loads(report.read_text()) if report.exists() else {}
    # pytest's exit code 5: nothing of this stage was chosen.
    return Outcome(0 if code == 5 else code, time.monotonic() - began, **found)


def close(outcomes: Sequence[Outcome], workers: int = WORKERS) -> int:
    """The table, the skips with the line that enables each, and the one line that machines read."""
    print("\n══ summary")
    total: Counter[str] = Counter()
    skips: Counter[str] = Counter()
    for stage in outcomes:
        for suite, counts in sorted(stage.counts.items(), key=lambda item: stage.times[item[0]]):
            numbers = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
            print(f"  {suite:<12} {stage.times[suite]:6.0f} s of tests   {numbers}")
            total.update(counts)
        skips.update(stage.skips)
        print(f"  {'':<12} {stage.seconds:6.0f} s with {workers} worker{'' if workers == 1 else 's'}")
    print("\n  skipped: nothing" if not skips else "\n  skipped:")
    for reason, count in skips.most_common():
        print(f"  {count:4}  {reason}")
    failed = total["failed"] + total["error"]
    print(f"\n{total['passed']} passed, {failed} failed, {total['skipped']} skipped")
    return 0 if all(stage.exit_code == 0 for stage in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
