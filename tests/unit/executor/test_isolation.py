"""Class `process`: where it is refused, as whom its jobs run, and in which words it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.executor.adapters.attempts.attempt_folder import AttemptSpec, MalformedSpec
from services.executor.adapters.runtimes.isolation import closed_to, in_words, probe
from services.executor.adapters.runtimes.sandbox import IsolationProbe
from services.executor.domain.isolation import refusal

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_one_team_on_loopback_may_run_without_walls(host: str) -> None:
    assert refusal("process", host, 1) == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.2", "nabla.example.org", ""])
def test_a_door_for_others_forbids_it_with_what_to_do(host: str) -> None:
    told = refusal("process", host, 1)
    assert f"listens on {host}" in told
    assert "127.0.0.1" in told


def test_a_second_team_is_refused() -> None:
    assert "first team" in refusal("process", "127.0.0.1", 2)


def test_behind_walls_nothing_is_refused() -> None:
    assert refusal("bwrap", "0.0.0.0", 9) == ""


def test_a_folder_that_others_may_not_pass_is_found_also_behind_a_link(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    closed, link = tmp_path / "closed", tmp_path / "link"
    (closed / "inner").mkdir(parents=True)
    link.symlink_to(closed / "inner")
    closed.chmod(0o755)
    uid = tmp_path.stat().st_uid + 61_000
    above = closed_to(uid, [tmp_path])
    assert closed_to(uid, [link]) == above
    closed.chmod(0o700)
    assert closed_to(uid, [link]) == (above or closed)
    assert closed_to(closed.stat().st_uid, [closed]) is None or above


def test_the_remedy_is_one_command_in_the_words() -> None:
    asked = probe("process")
    assert asked.isolation == "process"
    assert f"`{asked.remedy}` restores isolation" in in_words(asked)
    assert in_words(IsolationProbe("bwrap", "it works", "")) == "it works"


def test_only_without_walls_may_a_job_run_as_root() -> None:
    AttemptSpec(attempt_id="a", job_id="j", command="true", isolation="process", run_as_uid=0)
    with pytest.raises(MalformedSpec):
        AttemptSpec(attempt_id="a", job_id="j", command="true", isolation="bwrap", run_as_uid=0)
