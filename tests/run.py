"""The whole test suite, fastest suites first, with live progress and a closing table of what was skipped and why.

`python -m tests.run` is what `make test` calls after installing; `--full` adds what takes long, `--gpu` runs only
what needs a GPU. What Debian packages have and tests need is installed when this is root, else named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("unit", "contract", "integration", "e2e", "chaos")
# Each test of these has its own servers or none; the others share one platform.
PARALLEL = ("unit", "contract", "integration")
# Program (a glob) -> the package that has it.
SYSTEM = {
    "/usr/lib/postgresql/*/bin/initdb": "postgresql",
    "/usr/bin/chromium*": "chromium",
    "/usr/sbin/ip": "iproute2",
}


@dataclass
class Outcome:
    """What one suite came to."""

    suite: str
    exit_code: int
    seconds: float
    counts: Counter[str] = field(default_factory=Counter)
    skips: Counter[str] = field(default_factory=Counter)


def main() -> int:
    arguments = parse()
    if not arguments.gpu:
        install_system_packages()
    marks = "gpu" if arguments.gpu else "not gpu" if arguments.full else "not gpu and not full"
    suites = [suite for suite in SUITES if (ROOT / "tests" / suite).is_dir()]
    outcomes = [run_suite(suite, marks, arguments.rest) for suite in suites]
    return close(outcomes)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="also what takes long")
    parser.add_argument("--gpu", action="store_true", help="only what needs a GPU")
    parser.add_argument("rest", nargs="*", help="passed on to pytest")
    return parser.parse_args()


def install_system_packages() -> None:
    """As root, installs the Debian packages that are missing; an ordinary user's tests skip with the same line."""
    missing = [package for pattern, package in SYSTEM.items() if not list(Path("/").glob(pattern.lstrip("/")))]
    if not missing or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    print(f"── installing Debian packages: {' '.join(missing)}", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", *missing]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            print(f"   {' '.join(command)} failed; tests that need it are skipped:\n{done.stderr[-500:]}", flush=True)
            return


def run_suite(suite: str, marks: str, rest: Sequence[str]) -> Outcome:
    print(f"\n══ {suite}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            f"tests/{suite}",
            "-m",
            marks,
            "-p",
            "tests.support.report",
            f"--report-file={report}",
            "--no-header",
            "--tb=short",
            "-q",
            *(["-n", "2", "--dist", "loadfile"] if suite in PARALLEL else []),
            *rest,
        ]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        found = json.loads(report.read_text()) if report.exists() else {"counts": {}, "skips": {}}
    # pytest's exit code 5: nothing was collected, as all of the suite is left to `make test-full`.
    code = 0 if code == 5 else code
    return Outcome(suite, code, time.monotonic() - began, Counter(found["counts"]), Counter(found["skips"]))


def close(outcomes: Sequence[Outcome]) -> int:
    """The table, the skips with the line that enables each, and the one line that machines read."""
    print("\n══ summary")
    for each in outcomes:
        state = "ok" if each.exit_code == 0 else "FAILED"
        numbers = ", ".join(f"{count} {name}" for name, count in sorted(each.counts.items())) or "none"
        print(f"  {each.suite:<12} {state:<7} {each.seconds:6.1f} s   {numbers}")
    skips: Counter[str] = sum((each.skips for each in outcomes), Counter())
    print("\n  skipped: nothing" if not skips else "\n  skipped:")
    for reason, count in skips.most_common():
        print(f"  {count:4}  {reason}")
    total: Counter[str] = sum((each.counts for each in outcomes), Counter())
    failed = total["failed"] + total["error"]
    print(f"\n{total['passed']} passed, {failed} failed, {total['skipped']} skipped")
    return 0 if all(each.exit_code == 0 for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
