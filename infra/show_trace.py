"""Shows one trace as an indented tree: `python infra/show_trace.py JOB_ID|TRACE_ID [--home FOLDER] [--streams]`.

Reads the spans that the services and the node agents of this machine write to `<home>/traces` and
`<home>/node/traces`: the newest tens of megabytes of each. With a collector (OTEL_EXPORTER_OTLP_ENDPOINT) the same
spans are there, too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

HOME = Path(os.environ.get("NABLA_HOME", Path(__file__).resolve().parents[1] / ".nabla"))


@dataclass(frozen=True, slots=True)
class Span:
    """One step of a trace. Times are in seconds since the epoch."""

    trace_id: str
    id: str
    parent_id: str
    service: str
    name: str
    began_s: float
    ended_s: float
    object_id: str = ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("id", help="a trace id of 32 hexadecimal digits, or the id of a job")
    parser.add_argument("--home", type=Path, default=HOME, help="the installation's folder")
    parser.add_argument("--streams", action="store_true", help="also followers of logs and events, and polls")
    asked = parser.parse_args(arguments)
    spans = list(read_spans(asked.home))
    found = trace_of(asked.id, spans)
    if not found:
        print(f"There is no span of {asked.id} in {asked.home}/traces; spans are written a second late.")
        return 1
    print("\n".join(table(found if asked.streams else without_watchers(found))))
    return 0


def read_spans(home: Path) -> Iterator[Span]:
    for folder in (home / "traces", home / "node" / "traces"):
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text(errors="replace").splitlines():
                # One that is being written, or that a kill cut short, is half.
                with suppress(ValueError):
                    yield span_of(json.loads(line))


def span_of(plain: dict[str, Any]) -> Span:
    attributes = plain["attributes"]
    return Span(
        trace_id=plain["context"]["trace_id"].removeprefix("0x"),
        id=plain["context"]["span_id"].removeprefix("0x"),
        parent_id=(plain["parent_id"] or "").removeprefix("0x"),
        service=plain["resource"]["attributes"]["service.name"].removeprefix("nabla-"),
        name=plain["name"],
        began_s=datetime.fromisoformat(plain["start_time"]).timestamp(),
        ended_s=datetime.fromisoformat(plain["end_time"]).timestamp(),
        object_id=attributes.get("nabla.object", ""),
    )


def trace_of(wanted: str, spans: Iterable[Span]) -> list[Span]:
    """The spans of this trace; of a job, the trace with the earliest span that names it."""
    ordered = sorted(spans, key=lambda span: span.began_s)
    trace_id = next((span.trace_id for span in ordered if span.object_id == wanted), wanted)
    return [span for span in ordered if span.trace_id == trace_id]


def without_watchers(spans: list[Span]) -> list[Span]:
    """Without what a client that looks on asks for: it is no part of the work."""
    watching: set[str] = set()
    for span in spans:
        if span.parent_id in watching or (span.service == "gateway" and span.name.startswith("GET ")):
            watching.add(span.id)
    return [span for span in spans if span.id not in watching]


def table(spans: list[Span]) -> list[str]:
    """One line a span, children under their parent in order of time; times in milliseconds from the first."""
    zero = spans[0].began_s
    known = {span.id for span in spans}
    children: dict[str, list[Span]] = {}
    for span in spans:
        children.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)
    lines = [f"trace {spans[0].trace_id}", "", f"{'at ms':>9} {'took ms':>9}  {'service':<10} step"]

    def add(span: Span, depth: int) -> None:
        at, took = (span.began_s - zero) * 1000, (span.ended_s - span.began_s) * 1000
        name = span.name.removeprefix(f"{span.service} ")
        lines.append(f"{at:9.1f} {took:9.1f}  {span.service:<10} {'  ' * depth}{name}")
        for child in children.get(span.id, []):
            add(child, depth + 1)

    for root in children[""]:
        add(root, 0)
    return lines


if __name__ == "__main__":
    sys.exit(main())
