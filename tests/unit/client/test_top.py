"""Usage as text: what it looks like, and that nothing is shown twice."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from nabla.cli import top
from nabla.objects import Job, Point, Series

pytestmark = pytest.mark.unit


def series(name: str, values: dict[int, float]) -> Series:
    points = tuple(Point(value=value, step=step) for step, value in values.items())
    return Series(name=f"system/{name}", points=points, last=points[-1].value, point_count=len(points))


def test_charts_name_what_is_used_and_how_much() -> None:
    lines = top.charts(
        [
            series("gpu_0_percent", {1: 50.0}),
            series("memory_bytes", {1: 2e9, 2: 1e9}),
            series("cpu_percent", {1: 0.0, 2: 100.0}),
            series("gpu_0_power_watts", {2: 300.4}),
            series("disk_write_bytes_per_s", {2: 5e6}),
        ]
    )
    assert [line.split("  ")[0].rstrip() for line in lines] == [
        "CPU",
        "memory",
        "disk write",
        "GPU 0 use",
        "GPU 0 power",
    ]
    assert lines[0].endswith("▁█  100 %")
    assert lines[1].endswith("█▄  953.7 MiB")
    assert lines[2].endswith("/s")
    assert lines[4].endswith("300 W")


def test_a_second_without_a_sample_is_as_the_one_before_it() -> None:
    assert top.bars(series("cpu_percent", {0: 100.0, 10: 100.0}), 10) == " " * 49 + "█" * 11


def test_each_second_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[tuple[str, Sequence[Series]]] = [
        ("running", [series("cpu_percent", {1: 1.0, 2: 2.0}), series("memory_bytes", {1: 5.0})]),
        ("running", [series("cpu_percent", {1: 1.0, 2: 2.0})]),
        ("succeeded", [series("cpu_percent", {2: 2.0, 3: 3.0})]),
    ]
    states = iter(state for state, _ in looks)
    usages = iter(usage for _, usage in looks)
    jobs = SimpleNamespace(
        get=lambda _job: SimpleNamespace(job=Job(state=next(states))), usage=lambda _job, _newest: next(usages)
    )
    monkeypatch.setattr(top, "LOOK_S", 0)
    client: Any = SimpleNamespace(jobs=jobs)
    told = list(top.samples(client, "js1"))
    assert [(one["second"], one["cpu_percent"]) for one in told] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert told[0]["memory_bytes"] == 5.0
