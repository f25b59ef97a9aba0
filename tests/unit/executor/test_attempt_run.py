"""The order on disk: what an agent wrote, a later one of any version reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from libs.common.contracts.messages import JobTemplate
from services.executor.adapters.agent.attempt_run import read_order, write_order
from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.ports import StartOrder

pytestmark = pytest.mark.unit
ORDER = StartOrder("at1", "js1", 2, "t1", "pr1", "", JobTemplate(command=("true",)), "nbla_x", 61001, (0, 3), "00-1")


def test_an_order_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = AttemptFolder(tmp_path / "attempts" / "at1")
    assert read_order(folder) is None
    write_order(folder, ORDER)
    assert read_order(folder) == ORDER


def test_an_order_of_a_newer_agent_is_read(tmp_path: Path) -> None:
    folder = AttemptFolder(tmp_path / "attempts" / "at1")
    write_order(folder, ORDER)
    path = folder.path / "order.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"invented_later": 1}))
    assert read_order(folder) == ORDER
