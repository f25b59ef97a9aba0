"""What is written into a control group, on a machine that may have only the other version of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.executor.adapters.runtimes.cgroup import Cgroup, Limits

pytestmark = pytest.mark.unit
FILES = ("cgroup.controllers", "pids.max", "cpu.max", "memory.max", "memory.swap.max", "memory.oom.group")


def group_with(folder: Path, *names: str) -> Cgroup:
    for name in names:
        (folder / name).touch()
    return Cgroup(dict.fromkeys(("memory", "pids", "cpu"), folder))


def test_in_version_2_the_kernel_ends_all_of_a_job_that_runs_out_of_memory(tmp_path: Path) -> None:
    group_with(tmp_path, *FILES)._set(Limits(100 << 20, 1.5, 64))
    written = {name: (tmp_path / name).read_text() for name in FILES[1:]}
    assert written == {
        "pids.max": "64",
        "cpu.max": "150000 100000",
        "memory.max": str(100 << 20),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
    }


def test_an_older_kernel_without_that_setting_still_bounds_memory(tmp_path: Path) -> None:
    group_with(tmp_path, *FILES[:4])._set(Limits(100 << 20, 1.0, 64))
    assert (tmp_path / "memory.max").read_text() == str(100 << 20)
    assert not (tmp_path / "memory.oom.group").exists()
