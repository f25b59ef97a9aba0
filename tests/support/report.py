"""A pytest plugin that writes counts and skip reasons to a file, for the closing table of tests.run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report-file", default="", help="where to write counts and skip reasons")


class Report:
    def __init__(self, file: str) -> None:
        self._file = file
        self._counts: Counter[str] = Counter()
        self._skips: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self._counts["skipped"] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._skips[reason.removeprefix("Skipped: ")] += 1
        elif report.failed:
            self._counts["failed" if report.when == "call" else "error"] += 1
        elif report.when == "call":
            self._counts["passed"] += 1

    def pytest_sessionfinish(self) -> None:
        if self._file:
            Path(self._file).write_text(json.dumps({"counts": self._counts, "skips": self._skips}))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Report(config.getoption("--report-file")))
