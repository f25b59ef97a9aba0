"""A pytest plugin that writes counts, times and skip reasons to a file, for the closing table of tests.run."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report-file", default="", help="where to write counts and skip reasons")


class Report:
    """Hears every test's reports, those of other workers too."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._times: Counter[str] = Counter()
        self._skips: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        suite = report.nodeid.split("/")[1] if report.nodeid.startswith("tests/") else "other"
        counts = self._counts[suite]
        self._times[suite] += report.duration
        if report.skipped:
            counts["skipped"] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._skips[reason.removeprefix("Skipped: ")] += 1
        elif report.failed:
            counts["failed" if report.when == "call" else "error"] += 1
        elif report.when == "call":
            counts["passed"] += 1

    def pytest_sessionfinish(self) -> None:
        found = {"counts": self._counts, "times": self._times, "skips": self._skips}
        Path(self._file).write_text(json.dumps(found))


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--report-file")
    # A worker's reports reach the controller, which writes the file.
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Report(file))
