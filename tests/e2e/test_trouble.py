"""What goes wrong for people: each time a clear sentence with a remedy, never a traceback, nothing lost."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import httpx
import pytest

from infra.local.installation import next_free
from nabla import Client
from nabla.errors import Forbidden, Invalid, NotFound
from nabla.objects import JobTemplate, Resources
from tests.e2e.test_jobs import run_to_end
from tests.support.platform import Platform

pytestmark = pytest.mark.e2e


def test_an_unknown_project_is_named_with_what_to_do(platform: Platform, folder: Path) -> None:
    done = platform.command("run", "--project", "no-such-project", "--no-workspace", "--", "true", cwd=folder)
    assert done.returncode == 1
    assert "no-such-project" in done.stderr
    assert "Traceback" not in done.stderr
    assert "nabla projects" in done.stderr


def test_a_missing_file_is_named_before_anything_is_sent(platform: Platform, folder: Path) -> None:
    done = platform.command("models", "upload", "nowhere.joblib", "--name", "x", "--framework", "sklearn", cwd=folder)
    assert done.returncode in (1, 2)
    assert "nowhere.joblib" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_script_fails_the_job_with_a_hint(platform: Platform, folder: Path) -> None:
    done = platform.command("run", "--", "python", "missing.py", cwd=folder)
    assert done.returncode == 2
    assert "missing.py" in done.stdout + done.stderr


def test_a_wrong_token_is_refused_with_what_to_do(platform: Platform) -> None:
    with Client(platform.url, "nbl_wrong", patience_s=1) as client, pytest.raises(Exception, match="token") as caught:
        client.whoami()
    assert getattr(caught.value, "status", 401) == 401


def test_an_oversized_body_is_refused_as_a_problem(platform: Platform) -> None:
    headers = {"Authorization": f"Bearer {platform.token}"}
    for size in (2_000_000, 9_000_000, 30_000_000):
        body = b'{"name": "' + b"x" * size + b'"}'
        answer = httpx.post(f"{platform.url}/api/v1/projects", content=body, headers=headers, timeout=30)
        assert answer.status_code == 413, size
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["remedy"]


def test_a_command_that_does_not_exist_ends_with_127_and_a_hint(platform: Platform, folder: Path) -> None:
    done = platform.command("run", "--no-workspace", "--", "no-such-command-here", "--flag", cwd=folder)
    assert done.returncode == 127
    assert "no-such-command-here" in done.stderr + done.stdout
    assert "not" in done.stderr


def test_a_missing_module_gets_a_hint(platform: Platform, folder: Path) -> None:
    done = platform.command("run", "--no-workspace", "--", "python", "-c", "import nothing_of_that_name", cwd=folder)
    assert done.returncode == 1
    assert "--env" in done.stderr


def test_a_job_out_of_memory_says_peak_and_limit(platform: Platform, folder: Path) -> None:
    code = "x = []\nwhile True: x.append(bytearray(10_000_000))"
    done = platform.command("run", "--no-workspace", "--memory", "200M", "--", "python", "-c", code, cwd=folder)
    assert done.returncode not in (0, 3)
    assert "memory" in done.stderr
    assert "200" in done.stderr


def test_a_timeout_is_a_state_of_its_own(client: Client, project: str) -> None:
    job, _ = run_to_end(client, project, "sleep 100", timeout_s=1.0)
    assert job.state == "timed_out"


def test_impossible_wishes_are_refused_at_once(client: Client, project: str) -> None:
    with pytest.raises(Invalid):
        client.jobs.submit(project, JobTemplate(name="", command=()))
    with pytest.raises(Invalid):
        client.jobs.submit(project, JobTemplate(name="x", command=("true",), resources=Resources(cpu_count=-1)))


def test_what_does_not_exist_is_not_found(client: Client) -> None:
    for ask in (client.jobs.get, client.models.get, client.deployments.get, client.projects.get):
        with pytest.raises(NotFound):
            ask("js0000000000000000000000000")


def test_a_token_without_the_scope_may_not_write(platform: Platform, client: Client) -> None:
    token = client.tokens.create("reader", scopes=("read",))
    with Client(platform.url, token.secret, patience_s=1) as reader:
        assert reader.whoami().scopes == ("read",)
        with pytest.raises(Forbidden):
            reader.projects.create("not-allowed")


def test_a_taken_port_moves_to_the_next_and_is_said(tmp_path: Path) -> None:
    from infra.local.installation import claim_ports, open_installation
    from infra.local.settings import LocalSettings

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        installation, moved = claim_ports(open_installation(LocalSettings(home=tmp_path / "home", port=port)))
    assert installation.ports["front_door"] > port
    assert str(port) in moved[0]
    assert open_installation(LocalSettings(home=tmp_path / "home", port=port)).ports == installation.ports


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
def test_the_socket_of_another_users_object_store_is_gone_around(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    strangers = Path(f"/tmp/seaweedfs-master-grpc-{port}.sock")
    strangers.touch()
    try:
        os.chown(strangers, 65534, 65534)
        assert next_free("127.0.0.1", port, set()) > port
    finally:
        strangers.unlink()
    assert next_free("127.0.0.1", port, set()) == port
