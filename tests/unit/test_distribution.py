"""Files of one platform stay in one worker: by what really ran where, as xdist may drop groups without a word."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.distribution import group_of

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
from tests.support.distribution import PlatformScheduling

def pytest_xdist_make_scheduler(config, log):
    return PlatformScheduling(config, log)
"""
TESTS = """
import pytest

@pytest.mark.parametrize("n", range(6))
def test_it(n, worker_id, request):
    with (request.config.rootpath / "ran").open("a") as ran:
        ran.write(f"{request.path.parent.name}/{request.path.stem} {worker_id}\\n")
"""


@pytest.mark.parametrize(
    ("node", "group"),
    [
        ("tests/e2e/test_jobs.py::test_a[1]", "tests/e2e"),
        ("tests/chaos/test_kills.py::test_a[tests/unit/x.py::b]", "tests/chaos"),
        ("tests/e2e/installations/test_own.py::test_a", "tests/e2e/installations/test_own.py"),
        ("tests/unit/a/test_b.py::TestC::test_d", "tests/unit/a/test_b.py"),
    ],
)
def test_a_test_is_grouped_by_its_platform_or_its_file(node: str, group: str) -> None:
    assert group_of(node) == group


def test_no_group_is_run_by_two_workers(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for file in ("tests/e2e/test_one.py", "tests/e2e/test_two.py", "tests/unit/test_a.py", "tests/unit/test_b.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--import-mode=importlib", "-c", "/dev/null", str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "24 passed" in done.stdout, done.stdout + done.stderr
    workers = defaultdict(set)
    for line in (tmp_path / "ran").read_text().splitlines():
        name, worker = line.split()
        workers["e2e" if name.startswith("e2e/") else name].add(worker)
    assert {name: len(found) for name, found in workers.items()} == {"e2e": 1, "unit/test_a": 1, "unit/test_b": 1}
    assert len(set.union(*workers.values())) == 2
