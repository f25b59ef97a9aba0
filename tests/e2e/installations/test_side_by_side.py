"""Installations side by side, killed supervisors, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local import leftovers
from infra.local.control import front_door_answers
from nabla.objects import JobTemplate
from tests.support.platform import Platform, running_platform
from tests.support.ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.full]

DOWN_LIMIT_S = 10.0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def lone(home: Path) -> Iterator[Platform]:
    with running_platform(home) as platform:
        yield platform


def traces_of(home: Path) -> list[str]:
    """Every process whose command line, environment or working folder names the installation, but this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) in (os.getpid(), os.getppid()):
            continue
        try:
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            told += os.readlink(process / "cwd").encode()
        except OSError:
            continue
        if str(home).encode() in told:
            found.append(f"{process.name}: {told[:200]!r}")
    return found


def groups_of(attempt_id: str) -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"**/nabla-{attempt_id}"))


def sleeping_job(platform: Platform) -> str:
    """The id of the attempt of a job that is running."""
    with platform.client() as client:
        project, _ = client.projects.ensure("left")
        job = client.jobs.submit(project.id, JobTemplate(name="long", command=("echo up; sleep 600",)))
        assert next(line for line in client.jobs.follow(job.id) if line.text == "up")
        return client.jobs.get(job.id).job.attempt.id


def test_two_installations_with_the_same_wishes_live_side_by_side(tmp_path: Path) -> None:
    port = str(free_port())
    with (
        running_platform(tmp_path / "one", port=port) as one,
        running_platform(tmp_path / "two", port=port) as two,
    ):
        assert not set(one.installation.ports.values()) & set(two.installation.ports.values())
        assert one.installation.ports["front_door"] == int(port)
        assert f"port {port} is taken" in two.said
        for platform in (one, two):
            with platform.client() as client:
                client.projects.create("mine")
                assert [project.name for project in client.projects.list()] == ["mine"]
        pids = two.children()
        one.down()
        assert not front_door_answers(one.installation)
        assert two.children() == pids
        with two.client() as client:
            job = client.jobs.submit(
                next(client.projects.list()).id, JobTemplate(name="still", command=("echo still here",))
            )
            assert "still here" in [line.text for line in client.jobs.follow(job.id)]


def test_after_down_nothing_of_the_installation_is_left(lone: Platform, home: Path) -> None:
    attempt = sleeping_job(lone)
    began = time.monotonic()
    lone.down()
    took_s = time.monotonic() - began
    assert traces_of(home) == []
    assert groups_of(attempt) == []
    assert not lone.installation.ray_folder.exists()
    assert took_s < DOWN_LIMIT_S


def test_a_killed_supervisor_blocks_nothing_and_costs_no_job(lone: Platform, home: Path) -> None:
    attempt = sleeping_job(lone)
    ports = lone.installation.ports
    os.kill(int((home / "run" / "supervisor.lock").read_text()), signal.SIGKILL)
    lone.up()
    assert lone.installation.ports == ports, "what was left held a port"
    with lone.client() as client:
        (job,) = list(client.jobs.list(limit=5))
        assert (job.state, job.attempt.id) == ("running", attempt)
        client.jobs.stop(job.id)
        *_, last = client.jobs.watch(job.id)
        assert getattr(last, "state", "") == "cancelled"
    lone.down()
    assert traces_of(home) == []


def test_a_killed_supervisor_takes_its_children_along(lone: Platform, home: Path) -> None:
    pids = lone.children()
    os.kill(int((home / "run" / "supervisor.lock").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 15
    # The object store takes its time when it is asked kindly; `down` and the next `up` do not wait for it.
    while left := set(leftovers.processes_of(home)) - {pids["s3"]}:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
