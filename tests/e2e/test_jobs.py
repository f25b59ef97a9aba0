"""Jobs as a person meets them: by the command line, from a folder, to the exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nabla import Client
from nabla.objects import Job, JobTemplate, LogLine, Resources
from tests.support.platform import Platform

pytestmark = pytest.mark.e2e


def run_to_end(client: Client, project: str, *command: str, **template: object) -> tuple[Job, list[str]]:
    """The ended job and what it wrote to its own streams."""
    asked = JobTemplate(name="test", command=command, **template)  # type: ignore[arg-type]
    job = client.jobs.submit(project, asked)
    lines: list[str] = []
    for event in client.jobs.watch(job.id):
        if isinstance(event, LogLine):
            lines += [event.text] if event.stream != "nabla" else []
        else:
            job = event
    return job, lines


def test_run_sends_the_folder_follows_the_log_and_exits_like_the_job(platform: Platform, folder: Path) -> None:
    (folder / "main.py").write_text(
        "import pathlib\nprint(pathlib.Path('data.txt').read_text())\nraise SystemExit(3)\n"
    )
    (folder / "data.txt").write_text("forty-two")
    (folder / ".env").write_text("SECRET=1")
    done = platform.command("run", "--", "python", "main.py", cwd=folder)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "forty-two" in done.stdout
    assert ".env" in done.stderr
    assert "my-folder" in done.stderr


def test_the_first_line_of_the_log_names_the_environment(client: Client, project: str) -> None:
    job = client.jobs.submit(project, JobTemplate(name="env", command=("python", "-m", "pip", "--version")))
    lines = list(client.jobs.follow(job.id))
    assert lines[0].stream == "nabla"
    assert lines[0].text.startswith("environment: ")
    assert any(line.text.startswith("pip ") for line in lines)


def test_a_job_sees_only_what_was_built_for_it(platform: Platform, client: Client, project: str) -> None:
    code = "import json, os; print(json.dumps(dict(os.environ))); print(os.getuid(), os.path.exists('/etc/shadow'))"
    job, lines = run_to_end(client, project, "python", "-c", code)
    env = json.loads(lines[0])
    assert env["NABLA_JOB_ID"] == job.id
    assert env["NABLA_PROJECT_ID"] == project
    assert env["NABLA_WORLD_SIZE"] == "1"
    assert not {name for name in env if name.startswith(("RAY_", "AWS_", "NABLA_S3", "NABLA_NATS"))}
    uid, _, shadow = lines[1].partition(" ")
    assert (uid == "0", shadow) == (False, "False")


def test_a_job_reaches_the_front_door_and_nothing_else_of_the_host(
    platform: Platform, client: Client, project: str
) -> None:
    ports = platform.installation.ports
    code = (
        "import os, socket, urllib.request\n"
        "print(urllib.request.urlopen(os.environ['NABLA_API_URL'] + '/api/v1/health').status)\n"
        f"for port in ({ports['nats']}, {ports['s3']}, {ports['ray']}, {ports['traefik_api']}):\n"
        "    print(socket.socket().connect_ex(('127.0.0.1', port)))\n"
    )
    job, lines = run_to_end(client, project, "python", "-c", code)
    assert job.state == "succeeded", lines
    assert lines[0] == "200"
    assert len(lines) == 5
    assert "0" not in lines[1:]


def test_storage_is_the_same_in_every_job_and_artifacts_are_kept_whatever_the_end(
    platform: Platform, client: Client, project: str, tmp_path: Path
) -> None:
    write = 'echo kept > "$NABLA_STORAGE/note"; echo result > "$NABLA_ARTIFACTS/out.txt"; exit 7'
    job, _ = run_to_end(client, project, write)
    assert (job.state, job.exit_code) == ("failed", 7)
    _, lines = run_to_end(client, project, 'cat "$NABLA_STORAGE/note"')
    assert lines == ["kept"]
    shown = platform.command("artifacts", "list", job.id, "--json")
    assert [file["path"] for file in json.loads(shown.stdout)] == ["out.txt"], shown.stderr
    done = platform.command("artifacts", "download", job.id, "--to", str(tmp_path / "got"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "got" / "out.txt").read_text() == "result\n"


def test_metrics_logged_inside_a_job_come_back(client: Client, project: str) -> None:
    code = "import nabla\nfor n in range(5): nabla.log({'loss': 1 / (n + 1)}, step=n)\nnabla.log_params({'lr': 0.1})"
    job, lines = run_to_end(client, project, "python", "-c", code)
    assert job.state == "succeeded", lines
    (series,) = client.jobs.metrics(job.id, "loss")
    assert [point.value for point in series.points] == [1.0, 0.5, 1 / 3, 0.25, 0.2]
    assert client.jobs.tracked(job.id).params == {"lr": "0.1"}


def test_a_long_log_comes_whole_once_and_in_order_also_after_the_end(client: Client, project: str) -> None:
    job, lines = run_to_end(client, project, "python", "-c", "for n in range(20000): print(n)")
    assert lines == [str(n) for n in range(20000)]
    stored = [line.text for line in client.jobs.logs(job.id) if line.stream == "stdout"]
    assert stored == lines


def test_stop_ends_a_running_job(client: Client, project: str) -> None:
    job = client.jobs.submit(project, JobTemplate(name="long", command=("echo up; sleep 600",)))
    assert next(line for line in client.jobs.follow(job.id) if line.text == "up")
    client.jobs.stop(job.id)
    *_, last = client.jobs.watch(job.id)
    assert isinstance(last, Job)
    assert last.state == "cancelled"


def test_ctrl_c_detaches_and_attach_returns(platform: Platform, folder: Path) -> None:
    nabla = str(Path(sys.executable).parent / "nabla")
    command = [nabla, "run", "--no-workspace", "--", "echo one; sleep 4; echo two; exit 5"]
    process = subprocess.Popen(
        command, env=platform.environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    while "one" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    job_id = next(word.strip("`.") for word in said.split() if word.startswith("js"))
    assert f"jobs attach {job_id}" in said
    again = platform.command("jobs", "attach", job_id)
    assert "two" in again.stdout
    assert again.returncode == 5


def test_gpu_indices_are_given_to_one_job_at_a_time(client: Client, project: str) -> None:
    template = JobTemplate(
        name="gpu",
        command=("echo gpu=$CUDA_VISIBLE_DEVICES; sleep 2",),
        resources=Resources(gpu_count=1, cpu_count=0.1),
    )
    jobs = [client.jobs.submit(project, template) for _ in range(2)]
    seen = {line.text for job in jobs for line in client.jobs.follow(job.id) if line.text.startswith("gpu=")}
    assert seen == {"gpu=0", "gpu=1"}


def test_a_model_of_gpus_that_no_node_has_fails_the_job_with_the_reason(client: Client, project: str) -> None:
    """Not in a time limit of its own: it is over before its log could be followed."""
    job = client.jobs.submit(project, JobTemplate(name="h", command=("true",), resources=Resources(gpu_model="H200")))
    list(client.jobs.follow(job.id))
    found = client.jobs.get(job.id)
    known = "no node has a GPU whose model is known"
    assert (found.job.state, found.job.detail.partition("; ")[0]) == (
        "failed",
        "needs 1 H200 GPU, 1 CPU, and no node has such a GPU",
    )
    assert known in found.job.detail or "the GPUs here are" in found.job.detail
    assert found.attempts == (), "nothing was tried"


def test_a_job_that_cannot_be_placed_says_why_it_waits(client: Client, project: str) -> None:
    template = JobTemplate(name="huge", command=("true",), resources=Resources(gpu_count=64))
    job = client.jobs.submit(project, template)
    deadline = time.monotonic() + 30
    while "64" not in (detail := client.jobs.get(job.id).job.detail):
        assert time.monotonic() < deadline, detail
        time.sleep(0.1)
    assert "GPU" in detail
    assert client.jobs.stop(job.id).state == "cancelled"


def test_the_same_idempotency_key_makes_one_job(platform: Platform, client: Client, project: str) -> None:
    import httpx

    headers = {"Authorization": f"Bearer {platform.token}", "Idempotency-Key": "the-same"}
    body = {"project_id": project, "template": {"name": "once", "command": ["true"]}}
    ids = {
        httpx.post(f"{platform.url}/api/v1/jobs", json=body, headers=headers, timeout=30).json()["id"] for _ in range(3)
    }
    assert len(ids) == 1


@pytest.fixture(autouse=True)
def _the_platform_stays_whole(platform: Platform) -> object:
    """No test here may cost a process."""
    before = platform.children()
    yield None
    assert platform.children() == before
