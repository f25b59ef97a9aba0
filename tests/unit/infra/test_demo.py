"""What the demo leaves a person with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from infra.local.demo import commands

pytestmark = pytest.mark.unit


def test_its_commands_are_those_of_this_checkout_wherever_it_lies() -> None:
    nabla = Path("/home/me/nabla 1.0/it's/.venv/bin/nabla")
    logs, run, predict = (shlex.split(line) for line in commands(nabla, "js1", "digits", [[0.0, 10.0, 5.0]]))
    assert {line[0] for line in (logs, run, predict)} == {str(nabla)}
    assert logs[1:] == ["jobs", "logs", "js1"]
    assert run[-4:] == ["--", "python", "-c", "print(6 * 7)"]
    assert json.loads(predict[-1]) == [[0, 10, 5]]
