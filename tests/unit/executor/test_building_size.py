"""How much a folder takes is asked while a tool works in it."""

from __future__ import annotations

import threading
from pathlib import Path

from services.executor.adapters.environments.building import size_of


def test_what_goes_while_it_is_counted_is_no_error(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(bytes(100_000))
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            passing = tmp_path / "passing"
            passing.write_bytes(b"x")
            passing.unlink()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        sizes = [size_of(tmp_path) for _ in range(300)]
    finally:
        over.set()
        worker.join()
    assert min(sizes) >= 100_000
