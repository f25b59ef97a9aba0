"""The supervisor's own survival: whatever goes wrong with one child, the others keep running."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from infra.local.servers import Server
from infra.local.supervisor import MAX_BACKOFF_S, Child, Supervisor, turn_logs

pytestmark = pytest.mark.unit


def child(failures: int = 0) -> Child:
    return Child("a", lambda: 1, stop_s=1.0, is_service=False, failures=failures)


def pause_after(failures: int) -> float:
    """Seconds until a child that has just died, and did so before, is started again."""
    dead = child(failures)
    dead.ended(0.0)
    return dead.next_start


def test_the_first_restart_is_at_once_and_later_ones_wait_longer_and_longer() -> None:
    assert pause_after(0) == 0.0
    assert 0.8 <= pause_after(1) <= 1.2
    assert 3.2 <= pause_after(3) <= 4.8
    assert pause_after(20) <= MAX_BACKOFF_S * 1.2


def test_a_child_that_fails_for_days_does_not_end_the_supervisor() -> None:
    assert MAX_BACKOFF_S * 0.8 <= pause_after(5000) <= MAX_BACKOFF_S * 1.2


def test_a_child_that_ran_for_long_is_started_at_once_again() -> None:
    stable = child(failures=7)
    stable.started_at = 100.0
    stable.ended(1000.0)
    assert stable.next_start == 1000.0


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    for name in ("run", "logs"):
        (tmp_path / name).mkdir()
    return Supervisor(tmp_path / "run", tmp_path / "logs")


def test_a_program_that_has_gone_is_tried_again_later(supervisor: Supervisor, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    supervisor.add_server(Server("gone", [str(program)], ready=lambda: True))
    program.unlink()
    server = supervisor.children["gone"]
    while server.failures < 2:
        supervisor.tend()
        time.sleep(0.01)
    assert server.pid == 0


IGNORES_BEING_ASKED = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
signal.pause()
"""


def test_who_does_not_end_when_asked_is_killed(supervisor: Supervisor, tmp_path: Path) -> None:
    command = [sys.executable, "-c", IGNORES_BEING_ASKED, str(tmp_path / "deaf")]
    supervisor.add_server(Server("deaf", command, ready=lambda: True, stop_s=0.1))
    while not (tmp_path / "deaf").exists():
        time.sleep(0.01)
    supervisor.stop_all()
    with pytest.raises(ProcessLookupError):
        os.kill(supervisor.children["deaf"].pid, 0)


def test_a_state_that_could_not_be_written_is_written_later(supervisor: Supervisor) -> None:
    draft = supervisor.run_folder / ".supervisor.json"
    draft.mkdir()  # as good as a full disk: writing it fails
    supervisor.add_server(Server("sleeper", ["sleep", "600"], ready=lambda: True))
    supervisor.tend()
    draft.rmdir()
    supervisor.tend()
    state = json.loads((supervisor.run_folder / "supervisor.json").read_text())
    assert state["children"] == {"sleeper": supervisor.children["sleeper"].pid}
    supervisor.stop_all()


def test_logs_are_kept_below_a_size_while_their_writers_go_on(tmp_path: Path) -> None:
    with (tmp_path / "a.log").open("ab", buffering=0) as writer:
        writer.write(b"0123456789")
        turn_logs(tmp_path, 10)
        assert not (tmp_path / "a.log.1").exists()
        writer.write(b"more")
        turn_logs(tmp_path, 10)
        writer.write(b"new")
    assert (tmp_path / "a.log.1").read_bytes() == b"0123456789more"
    assert (tmp_path / "a.log").read_bytes() == b"new"
