"""The small file that says where a service listens: whoever reads it meanwhile finds it whole."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from libs.common.probes import write_whole

pytestmark = pytest.mark.unit

LONG = "x" * 200_000


def test_a_reader_never_finds_a_half(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    write_whole(path, LONG)
    seen: set[str] = set()
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(200):
        write_whole(path, LONG)
        write_whole(path, LONG.upper())
    over.set()
    reader.join(60)
    assert seen <= {LONG, LONG.upper()}
    assert [each.name for each in tmp_path.iterdir()] == ["registry.json"]
