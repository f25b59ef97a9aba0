"""The demo in class `process`, as where the kernel refuses namespaces; and where that class is not allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local import control, demo
from infra.local.installation import InstallationError
from infra.local.settings import LocalSettings
from nabla import Client
from nabla.objects import JobTemplate
from tests.e2e.test_jobs import run_to_end
from tests.support.platform import Platform, running_platform

pytestmark = pytest.mark.e2e

REMEDY = "NABLA_ISOLATION=auto nabla up"


@pytest.fixture(scope="module")
def unwalled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with running_platform(tmp_path_factory.mktemp("process") / "home", isolation="process") as platform:
        yield platform


@pytest.fixture
def client(unwalled: Platform) -> Iterator[Client]:
    with unwalled.client() as client:
        yield client


def test_the_demo_goes_its_whole_way(client: Client) -> None:
    job = demo.train(client)
    assert job.attempt.isolation == "process"
    deployment = demo.deploy(client, demo.registered_model(client, job))
    assert demo.predict(client, deployment) >= demo.SHOWN - 1


def test_the_class_its_reason_and_its_remedy_are_shown_everywhere(unwalled: Platform, client: Client) -> None:
    status = client.status()
    assert status.isolation == "process"
    assert REMEDY in status.isolation_detail
    assert [node.isolation for node in status.nodes] == ["process"]
    assert REMEDY in unwalled.said
    for command in ("status", "doctor"):
        shown = unwalled.command(command).stdout
        assert "process" in shown
        assert REMEDY in shown
    project, _ = client.projects.ensure("shown")
    job = client.jobs.submit(project.id, JobTemplate(name="class", command=("echo $NABLA_ISOLATION",)))
    lines = [line.text for line in client.jobs.follow(job.id)]
    assert "process" in lines
    assert any("isolation: process" in line and REMEDY in line for line in lines)
    shown_job = json.loads(unwalled.command("jobs", "get", job.id, "--json").stdout)
    assert shown_job["job"]["attempt"]["isolation"] == "process"


def test_a_job_has_an_environment_from_nothing_a_session_and_its_folders(client: Client) -> None:
    project, _ = client.projects.ensure("shown")
    code = (
        "import json, os, resource; print(json.dumps(dict(os.environ)));"
        "print(os.getsid(0) in (os.getpid(), os.getppid()), resource.getrlimit(resource.RLIMIT_CORE)[0])"
    )
    job, lines = run_to_end(client, project.id, "python", "-c", code)
    assert job.state == "succeeded", lines
    environment = json.loads(lines[0])
    assert not {name for name in environment if name.startswith(("RAY_", "AWS_", "NABLA_S3", "NABLA_NATS"))}
    assert all(Path(environment[f"NABLA_{name}"]).is_absolute() for name in ("WORKSPACE", "ARTIFACTS", "STORAGE"))
    assert lines[1] == "True 0"


def test_it_does_not_start_with_a_door_for_everybody(tmp_path: Path) -> None:
    settings = LocalSettings(home=tmp_path / "home", host="0.0.0.0", isolation="process")
    with pytest.raises(InstallationError, match=r"listens on 0\.0\.0\.0") as refused:
        control.up(settings, lambda _line: None)
    assert REMEDY in str(refused.value)
    assert not (tmp_path / "home" / "run" / "supervisor.json").exists()
