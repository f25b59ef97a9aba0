"""One trace from the command line to the finished job, across the bus."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from infra import show_trace
from tests.support.platform import Platform

pytestmark = pytest.mark.e2e

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
EVERYBODY = {"gateway", "scheduler", "executor", "agent", "storage", "registry"}


def test_a_job_is_one_trace_through_all_services(
    platform: Platform, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "main.py").write_text("import nabla, pathlib\nnabla.log({'loss': 1.0}, step=1)\nprint('hi')\n")
    environment = platform.environment | {"TRACEPARENT": f"00-{TRACE}-{CALLER}-01"}
    done = Platform(platform.home, environment).command("run", "--", "python", "main.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    job_id = next(word for word in done.stderr.split() if word.startswith("js"))
    spans = whole_trace(platform)
    names = {span.name for span in spans}
    assert {"POST /api/v1/experiments", "scheduler place job", "agent start", "registry run.log"} <= names
    assert len([span for span in spans if span.name == "POST /api/v1/experiments"]) == 1
    assert show_trace.main([job_id, "--home", str(platform.home)]) == 0
    shown = capsys.readouterr().out
    assert TRACE in shown
    assert "execution.start" in shown


def whole_trace(platform: Platform) -> list[show_trace.Span]:
    """All spans of our trace, of everybody and each under a known one; each service writes them a second late."""
    deadline = time.monotonic() + 20
    while True:
        spans = show_trace.trace_of(TRACE, show_trace.read_spans(platform.home))
        ended = {span.service for span in spans if span.name.endswith("job.succeeded")}
        unknown = {span.parent_id for span in spans} - {span.id for span in spans} - {CALLER}
        if {span.service for span in spans} >= EVERYBODY and ended >= {"storage", "registry"} and not unknown:
            return spans
        assert time.monotonic() < deadline, (unknown, sorted(f"{span.service} {span.name}" for span in spans))
        time.sleep(0.3)
