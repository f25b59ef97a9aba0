from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from nabla import paths
from nabla.cli import COMMANDS, platform, root
from nabla.contexts import ContextBook

from .conftest import Nabla
from .stub import JOB, Reply, StubServer, line, serve_run

pytestmark = pytest.mark.unit


def commands(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(group, click.Group):
        ctx = click.Context(group)
        for name in group.list_commands(ctx):
            yield from commands(group.get_command(ctx, name), (*path, name))  # type: ignore[arg-type]
    else:
        yield path, group


EVERY = [(path, command) for path, command in commands(root) if not isinstance(command, platform.Delegated)]


@pytest.mark.parametrize(("path", "command"), EVERY, ids=[" ".join(path) for path, _ in EVERY])
def test_every_command_has_json_and_an_example_that_parses(
    path: tuple[str, ...], command: click.Command, nabla: Nabla, folder: Path
) -> None:
    outcome = nabla(*path, "--help")
    assert outcome.code == 0
    assert "--json" in outcome.out
    assert "--context" in outcome.out
    assert "Example" in outcome.out
    for example in command.examples:  # type: ignore[attr-defined]
        assert example.startswith(f"nabla {' '.join(path)}")


def test_help_of_the_whole_names_every_command_once(nabla: Nabla) -> None:
    out = nabla("--help").out
    assert all(f"  {name} " in out for name in COMMANDS)
    for name, (_, _, text) in COMMANDS.items():
        assert text in out, name


def test_an_unknown_command_is_wrong_usage(nabla: Nabla) -> None:
    outcome = nabla("jbos")
    assert outcome.code == 2
    assert "No such command" in outcome.err


def test_without_a_server_it_says_what_to_do(nabla: Nabla, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/usr")
    outcome = nabla("jobs", "list")
    assert (outcome.code, outcome.out) == (1, "")
    assert "No Nabla server is known here." in outcome.err
    assert "nabla up" in outcome.err


def test_a_problem_is_rendered_with_its_remedy_on_standard_error(nabla: Nabla, server: StubServer) -> None:
    problem = {"title": "Not found", "detail": "no project 'x'", "remedy": "List them.", "trace_id": "abc"}
    server.on("GET", "/projects/x", Reply(404, problem))
    outcome = nabla("projects", "get", "x", "--json")
    assert outcome == (1, "", "Error: Not found: no project 'x'\n  List them.\n  (trace abc)\n")


def test_a_fault_of_the_client_shows_no_traceback(nabla: Nabla, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nabla.contexts.resolve", lambda name: 1 / 0)
    outcome = nabla("whoami")
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "ZeroDivisionError" in outcome.err


def test_lists_are_tables_for_people_and_json_for_programs(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/jobs", Reply(200, {"items": [JOB], "next_cursor": ""}))
    people, programs = nabla("jobs", "list"), nabla("jobs", "list", "--json", "--project", "digits")
    assert people.out.splitlines()[0].split() == ["ID", "NAME", "STATE", "EXIT", "DETAIL", "CREATED"]
    assert people.out.splitlines()[1].split()[:3] == ["js1", "train", "running"]
    assert "\x1b" not in people.out
    assert programs.json[0]["template"]["command"] == ["python", "train.py"]  # type: ignore[index]
    assert server.seen[-1].query["project_id"] == "digits"


def test_an_empty_list_says_so_on_standard_error(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/jobs", Reply(200, {"items": []}))
    assert nabla("jobs", "list") == (0, "", "No jobs. `nabla run -- COMMAND` starts one.\n")
    assert nabla("jobs", "list", "--json") == (0, "[]\n", "")


def test_failed_jobs_are_shown_with_their_last_lines_and_a_hint(nabla: Nabla, server: StubServer) -> None:
    job = {**JOB, "state": "failed", "exit_code": 127}
    server.on("GET", "/jobs/js1", Reply(200, {"job": job, "timeline": [{"state": "failed", "attempt": 1}]}))
    lines = [{"sequence": n, "text": f"line {n}"} for n in range(10, 30)]
    server.on("GET", "/jobs/js1/logs", Reply(200, {"lines": lines, "last_sequence": 29}))
    outcome = nabla("jobs", "get", "js1")
    assert "The last 20 lines:" in outcome.err
    assert "  line 29" in outcome.err
    assert "Hint: The command does not exist" in outcome.err
    assert server.seen[-1].query["after"] == "-20"


def test_attach_starts_before_the_last_lines_and_ends_with_the_job(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/jobs/js1/logs", Reply(200, {"lines": [{"sequence": 8}, {"sequence": 9}], "last_sequence": 9}))
    serve_run(server, line(8, "a"), line(9, "b"), line(10, "c"))
    assert nabla("jobs", "attach", "js1", "--tail", "2").out == "a\nb\nc\n"
    assert server.seen[-1].query["after"] == "7"


def test_logs_follow_on_where_the_page_ended(nabla: Nabla, server: StubServer) -> None:
    page = {"lines": [{"sequence": 1, "text": "a"}, {"sequence": 2, "text": "b"}], "last_sequence": 2}
    server.on("GET", "/jobs/js1/logs", Reply(200, page))
    serve_run(server, line(2, "b"), line(3, "c"))
    assert nabla("jobs", "logs", "js1", "--follow").out == "a\nb\nc\n"
    assert [json.loads(text)["text"] for text in nabla("jobs", "logs", "js1", "--json").out.splitlines()] == ["a", "b"]


def test_stopping_goes_on_after_a_job_that_cannot_be_stopped(nabla: Nabla, server: StubServer) -> None:
    server.on("POST", "/jobs/js1/stop", Reply(200, {"id": "js1", "state": "running"}))
    server.on("POST", "/jobs/js2/stop", Reply(404, {"title": "Not found", "detail": "There is no job 'js2'"}))
    server.on("POST", "/jobs/js3/stop", Reply(200, {"id": "js3", "state": "succeeded"}))
    people = nabla("jobs", "stop", "js1", "js2", "js3")
    assert (people.code, people.out) == (1, "")
    assert people.err.splitlines() == [
        "Stopping job js1.",
        "Error: Not found: There is no job 'js2'",
        "Job js3 is succeeded.",
    ]
    programs = nabla("jobs", "stop", "js1", "js2", "js3", "--json")
    assert programs.code == 1
    assert [job["id"] for job in programs.json] == ["js1", "js3"]  # type: ignore[attr-defined]
    assert "no job 'js2'" in programs.err
    assert nabla("jobs", "stop", "js1").code == 0


def test_login_saves_a_context_and_logout_forgets_it(
    nabla: Nabla, stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", "/usr")
    stub.on("GET", "/whoami", Reply(200, {"id": "us1", "name": "ada", "role": "owner"}))
    assert "as ada" in nabla("login", stub.url, "--token", "t", "--name", "here").err
    assert "ada" in nabla("whoami").out
    listed = nabla("contexts", "list", "--json")
    assert [(c["name"], c["in_force"]) for c in listed.json] == [("here", True)]  # type: ignore[attr-defined]
    assert nabla("logout").code == 0
    assert nabla("whoami").code == 1


def test_a_wrong_token_is_not_saved(nabla: Nabla, stub: StubServer, tmp_path: Path) -> None:
    stub.on("GET", "/whoami", Reply(401, {"title": "Unauthenticated", "detail": "unknown token"}))
    outcome = nabla("login", stub.url, "--token", "wrong")
    assert outcome.code == 1
    assert "unknown token" in outcome.err
    assert not (tmp_path / "config").exists()


def test_predict_prints_one_prediction_a_line(nabla: Nabla, server: StubServer, tmp_path: Path) -> None:
    deployment = {"id": "dp1", "name": "digits", "state": "ready", "path": "/s3d/digits", "endpoint_token": "ep"}
    server.on("GET", "/deployments/digits", Reply(200, deployment))
    server.on("POST", "/s3d/digits/predict", Reply(200, {"predictions": [5, 7]}))
    assert nabla("predict", "digits", "--json-data", "[[1], [2]]").out == "5\n7\n"
    (tmp_path / "rows.json").write_text('{"inputs": [[1]]}')
    assert nabla("predict", "digits", "--file", str(tmp_path / "rows.json"), "--json").json == {"predictions": [5, 7]}
    assert nabla("predict", "digits", "--json-data", "{").code == 2
    assert nabla("predict", "digits").code == 2


def test_a_deployment_that_fails_says_why(nabla: Nabla, server: StubServer) -> None:
    made = {"id": "dp1", "name": "digits", "state": "building"}
    server.on("POST", "/deployments", Reply(201, made))
    server.on("GET", "/deployments/dp1", Reply(200, {**made, "state": "failed", "detail": "no module named x"}))
    outcome = nabla("deployments", "create", "digits", "--model", "digits:2", "--project", "p", "--wait")
    assert outcome.code == 1
    assert "no module named x" in outcome.err
    assert server.calls("POST", "/deployments")[0].json == {"name": "digits", "project_id": "p", "model": "digits:2"}


STATUS = {
    "version": "0.1.0", "isolation": "process", "isolation_detail": "run `sudo aa-...`",
    "services": [{"name": "storage", "ready": True, "uptime_s": 5}, {"name": "registry", "ready": False}],
    "nodes": [{"hostname": "n1", "state": "ready", "cpu_count": 2, "memory_bytes": 1 << 30, "isolation": "process"}],
}  # fmt: skip


def test_status_and_doctor_tell_what_is_wrong(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/status", Reply(200, STATUS))
    server.on("GET", "/whoami", Reply(200, {"id": "us1", "role": "owner"}))
    server.on("GET", "/health", Reply(200, {"status": "ok", "installation_id": ""}))
    status = nabla("status")
    assert "sudo aa-" in status.out
    assert "not ready" in status.out
    doctor = nabla("doctor", "--json")
    assert doctor.code == 1
    found = {check["name"]: check for check in doctor.json}  # type: ignore[attr-defined]
    assert found["registry"]["verdict"] == "bad"
    assert found["isolation"]["verdict"] == "warning"
    assert found["isolation"]["remedy"] == "run `sudo aa-...`"
    assert {"client", "context", "server", "token", "node n1", "disk (cache)"} <= set(found)


@pytest.mark.parametrize(
    ("isolation", "runtimes", "verdict", "told"),
    [
        ("bwrap", [], "ok", "bwrap: jobs run in sandboxes of their own"),
        ("podman", [], "ok", "podman: jobs run in containers of their own"),
        ("bwrap", ["podman"], "ok", "with an image: podman (jobs run in containers of their own)"),
        ("process", [], "warning", "process: jobs are not sandboxed"),
        ("process", ["podman"], "warning", "process: jobs without an image are not sandboxed; with an image: podman"),
        ("", [], "warning", "unknown"),
    ],
)
def test_the_doctor_says_of_each_runtime_whether_it_has_walls(
    nabla: Nabla, server: StubServer, isolation: str, runtimes: list[str], verdict: str, told: str
) -> None:
    node = {**STATUS["nodes"][0], "runtimes": runtimes}
    server.on("GET", "/status", Reply(200, {**STATUS, "isolation": isolation, "nodes": [node]}))
    server.on("GET", "/whoami", Reply(200, {"id": "us1", "role": "owner"}))
    server.on("GET", "/health", Reply(200, {"status": "ok", "installation_id": ""}))
    found = {check["name"]: check for check in nabla("doctor", "--json").json}  # type: ignore[attr-defined]
    assert found["isolation"]["verdict"] == verdict
    assert told in found["isolation"]["detail"]


def test_the_doctor_does_not_take_another_web_server_for_nabla(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/health", Reply(200, {"status": "ok"}))
    doctor = nabla("doctor")
    assert doctor.code == 1
    assert "is not Nabla" in doctor.out
    assert "ok    server" not in doctor.out


def test_the_doctor_looks_at_the_disk_of_the_context_that_was_named(
    nabla: Nabla, stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "context.json").write_text(json.dumps({"url": stub.url, "token": "t"}))
    monkeypatch.setenv("NABLA_HOME", str(tmp_path))
    ContextBook(paths.config_file()).save("elsewhere", stub.url, "t")

    def disks(*options: str) -> set[str]:
        found = nabla("doctor", "--json", *options).json
        return {check["name"] for check in found if "disk" in check["name"]}  # type: ignore[attr-defined]

    assert disks() == {"disk", "disk (cache)"}
    assert disks("--context", "elsewhere") == {"disk (cache)"}


def test_up_without_the_platform_says_where_it_works(nabla: Nabla, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = nabla("up")
    assert outcome.code == 1
    assert "only where the platform is installed" in outcome.err


def test_up_passes_everything_on(nabla: Nabla, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str]) -> None:
            called.append(command)

        def wait(self) -> int:
            return 7

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("subprocess.Popen", Process)
    assert nabla("up", "--port", "7001", "--help").code == 7
    assert called == [[sys.executable, "-m", "services", "up", "--port", "7001", "--help"]]


def test_a_reader_that_leaves_early_is_no_error(server: StubServer, tmp_path: Path) -> None:
    jobs = [{**JOB, "id": f"js{n}"} for n in range(5000)]
    server.on("GET", "/jobs", Reply(200, {"items": jobs[:200], "next_cursor": "x"}))
    client = Path(__file__).parents[3] / "libs" / "client"
    shell = f"{sys.executable} -c 'from nabla.cli import main; main()' jobs list --limit 5000 --json | head -1"
    done = subprocess.run(
        ["sh", "-c", shell],
        env={**os.environ, "PYTHONPATH": str(client)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_an_answer_of_another_version_is_no_fault_of_the_client(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/projects/x", Reply(200, {"created_at": "yesterday"}))
    outcome = nabla("projects", "get", "x")
    assert outcome.code == 1
    assert "nabla doctor" in outcome.err
    assert "fault of the client" not in outcome.err


def test_rows_that_are_no_text_are_wrong_usage(nabla: Nabla, server: StubServer, tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"\xff\xfe")
    assert nabla("predict", "digits", "--file", str(tmp_path / "rows")).code == 2


def test_a_name_cannot_take_over_the_terminal(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/projects", Reply(200, {"items": [{"id": "pj1", "name": "\x1b[2Jevil"}]}))
    assert "\x1b" not in nabla("projects", "list").out


@pytest.mark.parametrize("command", ["up", "down"])
def test_help_of_the_platforms_own_commands_has_an_example_and_json(command: str) -> None:
    shell = [sys.executable, "-c", "from nabla.cli import main; main()", command, "--help"]
    done = subprocess.run(shell, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"nabla {command}" in done.stdout
    assert "--json" in done.stdout


def test_a_deployment_that_fails_says_where_its_log_is(nabla: Nabla, server: StubServer) -> None:
    made = {"id": "dp1", "name": "digits", "state": "failed", "revision": {"build_job_id": "js8"}}
    server.on("POST", "/deployments", Reply(201, made))
    outcome = nabla("deployments", "create", "digits", "--model", "digits", "--project", "p")
    assert "nabla jobs logs js8" in outcome.err
