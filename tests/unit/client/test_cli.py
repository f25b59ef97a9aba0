from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from nabla.cli import COMMANDS, environment, platform, root
from nabla.cli.failures import guarded
from nabla.cli.submission import model_output, name_of
from nabla.cli.values import size, span

from .stub import Reply, Seen, StubServer, line, sse


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> object:
        return json.loads(self.out)


Nabla = Callable[..., Outcome]


@pytest.fixture
def nabla(capfd: pytest.CaptureFixture[str]) -> Nabla:
    def invoke(*arguments: str) -> Outcome:
        code = guarded(lambda: root.main(list(arguments), prog_name="nabla", standalone_mode=False))
        return Outcome(code, *capfd.readouterr())

    return invoke


@pytest.fixture
def server(stub: StubServer, monkeypatch: pytest.MonkeyPatch) -> StubServer:
    monkeypatch.setenv("NABLA_URL", stub.url)
    monkeypatch.setenv("NABLA_TOKEN", "t")
    return stub


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "My Digits"
    path.mkdir()
    (path / "train.py").write_text("print(1)")
    (path / ".env").write_text("SECRET=1")
    monkeypatch.chdir(path)
    return path


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


JOB = {
    "id": "js1", "state": "running", "project_id": "pj1", "created_at": "2026-01-01T00:00:00Z",
    "template": {"name": "train", "command": ["python", "train.py"]},
}  # fmt: skip


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


def serve_run(server: StubServer, *stream: bytes, state: str = "succeeded", **ended: object) -> None:
    fileset = {"id": "fs1", "state": "sealed"}
    server.on("POST", "/projects", Reply(201, {"id": "pj1", "name": "my-digits", "state": "active"}))
    server.on("GET", "/projects/pj1", Reply(200, {"id": "pj1", "name": "my-digits", "state": "active"}))
    server.on("POST", "/filesets", Reply(201, {"fileset": fileset, "uploads": []}))
    server.on("POST", "/experiments", lambda seen: Reply(201, {"id": "ex1", "jobs": [{**JOB, "state": "submitted"}]}))
    end = sse("end", {**JOB, "state": state, **ended})
    server.on("GET", "/jobs/js1/logs/stream", Reply(chunks=[*stream, end]))


def test_run_makes_a_project_of_the_folder_says_so_and_remembers_it(
    nabla: Nabla, server: StubServer, folder: Path
) -> None:
    serve_run(server, sse("state", {**JOB, "state": "waiting", "detail": "Ray is starting"}), line(1, "hello"))
    first = nabla("run", "--env", "SEED=1", "--memory", "2G", "--model", "digits=m:sklearn", "--", "python", "train.py")
    assert (first.code, first.out) == (0, "hello\n")
    assert "Project my-digits (created, named after this folder" in first.err
    assert "Left out for safety: .env\n" in first.err
    assert "[waiting] Ray is starting" in first.err
    assert nabla("run", "python", "train.py", "--json").code == 0
    assert len(server.calls("POST", "/projects")) == 1
    sent = server.calls("POST", "/experiments")[0].json
    template = sent["template"]
    assert (sent["project_id"], sent["name"], sent["kind"]) == ("pj1", "train", "single")
    assert isinstance(template, dict)
    assert template["command"] == ["python", "train.py"]
    assert template["env"] == {"SEED": "1"}
    assert template["resources"]["memory_bytes"] == 2 << 30
    assert template["workspace_id"] == "fs1"
    assert template["environment"]["kind"] == "default"
    assert template["models"] == [{"name": "digits", "path": "m", "framework": "sklearn"}]
    assert template["origin"]["folder"] == "My Digits"
    assert not any(path.name.startswith("folders") for path in folder.rglob("*"))


def test_the_commands_own_options_are_left_alone(nabla: Nabla, server: StubServer, folder: Path) -> None:
    serve_run(server)
    nabla("run", "--no-workspace", "--project", "p", "python", "t.py", "--json", "--env", "x", "--", "-h")
    template = server.calls("POST", "/experiments")[0].json["template"]
    assert template["command"] == ["python", "t.py", "--json", "--env", "x", "--", "-h"]  # type: ignore[index]
    assert not server.calls("POST", "/filesets")


def test_a_failed_job_gives_its_exit_code_and_one_hint(nabla: Nabla, server: StubServer, folder: Path) -> None:
    lines = [line(n, f"line {n}") for n in range(1, 30)] + [
        line(30, "ModuleNotFoundError: No module named 'x'", "stderr")
    ]
    serve_run(server, *lines, state="failed", exit_code=3, detail="the command failed")
    outcome = nabla("run", "--", "python", "train.py")
    assert outcome.code == 3
    assert outcome.out.splitlines() == [f"line {n}" for n in range(1, 30)]
    assert "Job js1 failed with exit code 3: the command failed" in outcome.err
    assert outcome.err.count("Hint:") == 1


def test_json_run_has_only_the_job_on_standard_output(nabla: Nabla, server: StubServer, folder: Path) -> None:
    serve_run(server, line(1, "hello"))
    outcome = nabla("run", "--json", "--", "python", "train.py")
    assert outcome.json["state"] == "succeeded"  # type: ignore[index]
    assert "hello" in outcome.err


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        ({"state": "failed"}, 1),
        ({"state": "failed", "exit_code": -9}, 137),
        ({"state": "timed_out"}, 124),
        ({"state": "cancelled", "exit_code": 143}, 143),
    ],
)
def test_the_exit_code_is_the_jobs(
    nabla: Nabla, server: StubServer, folder: Path, ended: dict[str, object], code: int
) -> None:
    serve_run(server, **ended)  # type: ignore[arg-type]
    assert nabla("run", "--", "false").code == code


def test_ctrl_c_detaches_and_says_how_to_come_back(nabla: Nabla, server: StubServer, folder: Path) -> None:
    def interrupt(seen: Seen) -> Reply:
        os.kill(os.getpid(), 2)
        return Reply(chunks=[])

    serve_run(server)
    server.on("GET", "/jobs/js1/logs/stream", interrupt)
    outcome = nabla("run", "--", "sleep", "99")
    assert outcome.code == 130
    assert "nabla jobs attach js1" in outcome.err
    assert not server.calls("POST", "/jobs/js1/stop")


def test_detached_prints_the_id(nabla: Nabla, server: StubServer, folder: Path) -> None:
    serve_run(server)
    assert nabla("run", "--detach", "--", "true").out == "js1\n"


def test_a_home_folder_is_asked_about_first(
    nabla: Nabla, server: StubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_run(server)
    monkeypatch.setattr(Path, "home", lambda: folder)
    refused = nabla("run", "--", "true")
    assert refused.code == 2
    assert "your home folder" in refused.err
    assert not server.seen
    assert nabla("run", "--yes", "--", "true").code == 0
    assert nabla("run", "--no-workspace", "--", "true").code == 0


@pytest.mark.parametrize(("limit", "value"), [("ASK_ABOVE_BYTES", 3), ("ASK_ABOVE_FILES", 0)])
def test_much_that_is_new_is_asked_about_first(
    nabla: Nabla, server: StubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    serve_run(server)
    monkeypatch.setattr(f"nabla.cli.submission.{limit}", value)
    refused = nabla("run", "--", "true")
    assert refused.code == 2
    assert "1 new files" in refused.err
    assert not server.calls("POST", "/filesets")
    assert nabla("run", "--yes", "--", "true").code == 0


def test_the_active_environment_is_bound_on_the_same_machine(
    nabla: Nabla, server: StubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def kind(*options: str) -> str:
        assert nabla("run", *options, "--", "true").code == 0
        return server.calls("POST", "/experiments")[-1].json["template"]["environment"]["kind"]  # type: ignore[index]

    (tmp_path / "venv").mkdir()
    serve_run(server)
    assert kind() == "default"
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "venv"))
    server.on("GET", "/status", Reply(200, {"nodes": [{"hostname": socket.gethostname()}]}))
    assert kind() == "venv"
    assert kind("--env", "default") == "default"
    server.on("GET", "/status", Reply(200, {"nodes": [{"hostname": "elsewhere"}]}))
    assert kind() == "default"
    (folder / "needs.txt").write_text("numpy\n")
    assert kind("--env", "needs.txt", "--env", "A=1") == "requirements"


def test_the_platforms_own_environment_is_not_offered(tmp_path: Path) -> None:
    own = tmp_path / ".venv"
    own.mkdir()
    assert environment.active_environment({"VIRTUAL_ENV": str(own)}) == own
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").touch()
    assert environment.active_environment({"VIRTUAL_ENV": str(own)}) is None
    assert environment.active_environment({"CONDA_PREFIX": str(tmp_path / "gone")}) is None


def test_two_environments_are_wrong_usage(nabla: Nabla, folder: Path) -> None:
    assert nabla("run", "--env", "active", "--env", "default", "--", "true").code == 2


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
    server.on("GET", "/health", Reply(200, {"status": "ok"}))
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


def test_values_are_read_as_people_write_them() -> None:
    assert [size(text) for text in ("0", "512M", "4G", "1.5GiB", "2kb", "1t")] == [
        0, 512 << 20, 4 << 30, 3 << 29, 2048, 1 << 40,
    ]  # fmt: skip
    assert [span(text) for text in ("90", "90s", "30m", "2h", "1d", "0.5h")] == [90, 90, 1800, 7200, 86400, 1800]
    for wrong in ("4X", "", "-1G"):
        with pytest.raises(click.BadParameter):
            size(wrong)
    with pytest.raises(click.BadParameter):
        span("soon")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("python", "-u", "src/train.py", "--lr", "1"), "train"),
        (("echo hi && ls",), "echo"),
        (("/usr/bin/make", "all"), "make"),
        (("$(x)",), "x"),
    ],
)
def test_a_job_is_named_after_its_script(command: tuple[str, ...], name: str) -> None:
    assert name_of(command) == name


def test_model_outputs_are_read() -> None:
    assert model_output("digits=out/model:sklearn").framework == "sklearn"
    assert model_output("digits=out/model").path == "out/model"
    with pytest.raises(click.BadParameter):
        model_output("digits")
