"""nabla jobs top: what a running job uses of its node, as text that moves."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from nabla.cli.output import note
from nabla.hints import readable_size

if TYPE_CHECKING:
    from nabla.client import Client
    from nabla.objects import Series

LOOK_S = 1.0
SECONDS = 60
_BARS = " ▁▂▃▄▅▆▇█"
_GPU = re.compile(r"system/gpu_(\d+)_(\w+)")
_TITLES = {
    "cpu_percent": "CPU",
    "memory_bytes": "memory",
    "disk_read_bytes_per_s": "disk read",
    "disk_write_bytes_per_s": "disk write",
    "network_receive_bytes_per_s": "network in",
    "network_send_bytes_per_s": "network out",
}
_ORDER = list(_TITLES)


def show(client: Client, job_id: str, as_json: bool) -> None:
    """Until the job has ended. Not on a terminal: once, as it is now; as JSON one object a line for each second."""
    if as_json:
        for sample in samples(client, job_id):
            click.echo(json.dumps(sample))
        return
    drawn = 0
    for ended, usage in _looks(client, job_id):
        lines = charts(usage) or ["Nothing is known yet of what the job uses."]
        if not sys.stdout.isatty():
            return click.echo("\n".join(lines))
        click.echo((f"\x1b[{drawn}A" if drawn else "") + "".join(f"\x1b[K{line}\n" for line in lines), nl=False)
        drawn = max(drawn, len(lines))
        if ended:
            note(f"The job is {ended}.")
    return None


def samples(client: Client, job_id: str) -> Iterator[dict[str, object]]:
    """One for each second that was sampled, from now on: the values by name, without the common `system/`."""
    last = None
    for _, usage in _looks(client, job_id):
        by_step: dict[int, dict[str, object]] = {}
        for series in usage:
            for point in series.points:
                at = point.at.isoformat() if point.at else None
                sample = by_step.setdefault(point.step, {"second": point.step, "at": at})
                sample[series.name.split("/", 1)[1]] = point.value
        for step in sorted(by_step):
            if last is None or step > last:
                yield by_step[step]
        last = max(by_step, default=last)


def _looks(client: Client, job_id: str) -> Iterator[tuple[str, Sequence[Series]]]:
    """(how the job has ended or "", what it used of late), once a second until it has ended."""
    while True:
        job = client.jobs.get(job_id).job
        ended = job.state if job.ended else ""
        yield ended, client.jobs.usage(job_id, SECONDS)
        if ended:
            return
        time.sleep(LOOK_S)


def charts(usage: Sequence[Series]) -> list[str]:
    """A line for each series: its name, the last minute as bars, and its value now."""
    shown = sorted((series for series in usage if series.points), key=lambda series: _place(series.name))
    newest = max((series.points[-1].step for series in shown), default=0)
    width = max((len(_title(series.name)) for series in shown), default=0)
    return [
        f"{_title(series.name):<{width}}  {bars(series, newest)}  {_amount(series.name, series.points[-1].value)}"
        for series in shown
    ]


def bars(series: Series, newest: int) -> str:
    """The last minute, a character a second; a second without a sample is as the one before it."""
    values = {point.step: point.value for point in series.points}
    top = max([100.0 if series.name.endswith("percent") else 0.0, *values.values()]) or 1.0
    text, value = "", None
    for step in range(newest - SECONDS + 1, newest + 1):
        value = values.get(step, value)
        text += " " if value is None else _BARS[max(1, min(8, round(value / top * 8)))]
    return text


def _place(name: str) -> tuple[int, str]:
    bare = name.split("/", 1)[-1]
    return (_ORDER.index(bare) if bare in _ORDER else len(_ORDER), bare)


def _title(name: str) -> str:
    gpu = _GPU.fullmatch(name)
    if gpu:
        return f"GPU {gpu.group(1)} {gpu.group(2).rsplit('_', 1)[0].replace('percent', 'use')}"
    bare = name.split("/", 1)[-1]
    return _TITLES.get(bare, bare)


def _amount(name: str, value: float) -> str:
    if name.endswith("percent"):
        return f"{value:.0f} %"
    if name.endswith("watts"):
        return f"{value:.0f} W"
    return readable_size(int(value)) + ("/s" if name.endswith("per_s") else "")
