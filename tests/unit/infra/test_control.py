"""Who runs an installation, and who is told to end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local import leftovers
from infra.local.control import _lock, _turn, supervisor_pid
from infra.local.installation import Installation, InstallationError, open_installation
from infra.local.settings import LocalSettings

pytestmark = pytest.mark.unit


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return open_installation(LocalSettings(home=tmp_path / "home"))


def holder_with_a_service(installation: Installation) -> tuple[int, int]:
    """A process that holds the lock as the supervisor does, and one that it has forked since; their pids."""
    told, tell = os.pipe()
    holder = os.fork()
    if not holder:
        with _lock(installation):
            service = os.fork()
            if service:
                os.write(tell, b"%d\n" % service)
            signal.pause()
        os._exit(0)
    with os.fdopen(told) as pipe:
        return holder, int(pipe.readline())


def test_a_killed_supervisor_is_not_taken_for_running_because_of_its_services(installation: Installation) -> None:
    assert supervisor_pid(installation) == 0
    holder, service = holder_with_a_service(installation)
    try:
        assert supervisor_pid(installation) == holder
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        assert supervisor_pid(installation) == 0
    finally:
        os.kill(service, signal.SIGKILL)


def test_the_pid_is_that_of_the_lock_and_not_what_the_file_says(installation: Installation) -> None:
    """`down` signals this pid: with the file's, a strange process; with -1, every process of this user."""
    holder, service = holder_with_a_service(installation)
    try:
        for text in ("", "1", "nonsense"):
            (installation.run / "supervisor.lock").write_text(text)
            assert supervisor_pid(installation) == holder
    finally:
        for pid in (holder, service):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(holder, 0)


def test_a_second_supervisor_is_refused(installation: Installation) -> None:
    holder, service = holder_with_a_service(installation)
    try:
        with pytest.raises(InstallationError, match="already running"), _lock(installation):
            pass
    finally:
        for pid in (holder, service):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(holder, 0)


def test_a_second_up_waits_for_the_first_and_says_so(installation: Installation) -> None:
    first = _turn(installation, pytest.fail)
    first.__enter__()
    said: list[str] = []

    def told(line: str) -> None:
        said.append(line)
        first.__exit__(None, None, None)

    with _turn(installation, told):
        assert said == ["Another `up` is starting Nabla here: waiting for it"]


@contextlib.contextmanager
def marked_process(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that shows its mark: the kernel lets a new program's environment be read a moment after it began."""
    with subprocess.Popen(["sleep", "600"], env=leftovers.marked(home) | {"PATH": os.environ["PATH"]}) as process:
        try:
            while process.pid not in leftovers.processes_of(home):
                assert process.poll() is None
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def test_a_process_that_cannot_be_ended_is_named_and_not_waited_for_for_ever(tmp_path: Path) -> None:
    with marked_process(tmp_path) as process:
        with pytest.raises(InstallationError, match=str(process.pid)):
            leftovers.end_processes(tmp_path, patience_s=600, limit_s=-600)
        assert process.poll() is None


def test_a_process_that_does_not_end_by_itself_is_killed(tmp_path: Path) -> None:
    with marked_process(tmp_path) as process:
        leftovers.end_processes(tmp_path, patience_s=0.0)
        assert process.wait() == -signal.SIGKILL
