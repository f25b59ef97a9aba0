from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from nabla import installations
from nabla.cli import environment
from nabla.cli.output import one_line
from nabla.cli.submission import model_output, name_of
from nabla.cli.values import size, span
from nabla.errors import NablaError
from nabla.remembered import Folders

from .conftest import Nabla
from .stub import JOB, Reply, Seen, StubServer, line, serve_run, sse

pytestmark = pytest.mark.unit


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


def test_an_image_is_asked_for_with_its_user_and_the_name_of_its_secret(
    nabla: Nabla, server: StubServer, folder: Path
) -> None:
    serve_run(server, line(1, "hello"))
    words = ["--container", "r.example/team/image:1", "--container-user", "app"]
    words += ["--registry-username", "me", "--registry-password", "secret:registry"]
    assert nabla("run", *words, "--", "python", "train.py").code == 0
    template = server.calls("POST", "/experiments")[0].json["template"]
    assert isinstance(template, dict)
    assert template["container"] == {
        "image": "r.example/team/image:1",
        "dockerfile": "",
        "user": "app",
        "registry_username": "me",
        "registry_password": "secret:registry",
        "build_args": {},
        "built": "",
    }


@pytest.mark.parametrize(
    ("words", "path"), [(["--dockerfile"], "Dockerfile"), (["--dockerfile", "docker/Dev"], "docker/Dev")]
)
def test_a_dockerfile_of_the_folder_is_named_and_no_environment_sent(
    nabla: Nabla, server: StubServer, folder: Path, words: list[str], path: str
) -> None:
    serve_run(server, line(1, "hello"))
    assert nabla("run", "--build-arg", "V=1", *words, "--", "python", "train.py").code == 0
    template = server.calls("POST", "/experiments")[0].json["template"]
    assert isinstance(template, dict)
    assert template["container"]["dockerfile"] == path
    assert template["container"]["build_args"] == {"V": "1"}
    assert template["environment"]["kind"] == "default"
    assert template["workspace_id"] == "fs1"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--container-user", "app"], "name it with --container"),
        (["--container", "python:3.12", "--env", "active"], "An image brings its own Python"),
        (["--container", "python:3.12", "--dockerfile"], "leave one of them out"),
        (["--dockerfile", "--no-workspace"], "a file of the workspace"),
        (["--build-arg", "A=1"], "name it with --dockerfile"),
    ],
)
def test_what_does_not_go_with_an_image_is_said_at_once(
    nabla: Nabla, server: StubServer, folder: Path, words: list[str], told: str
) -> None:
    serve_run(server)
    refused = nabla("run", *words, "--", "true")
    assert (refused.code, server.calls("POST", "/experiments")) == (2, [])
    assert told in " ".join(refused.err.split())


@pytest.mark.parametrize("known", ["remembered", "named like the folder"])
def test_an_archived_project_is_said_before_anything_is_packed(
    nabla: Nabla, server: StubServer, folder: Path, known: str
) -> None:
    serve_run(server)
    server.on("POST", "/projects", Reply(409, {"title": "Taken", "code": "project_exists", "project_id": "pj1"}))
    server.on("GET", "/projects/pj1", Reply(200, {"id": "pj1", "name": "my-digits", "state": "archived"}))
    if known == "remembered":
        Folders().remember(server.url, folder, "pj1")
    outcome = nabla("run", "--", "true")
    assert outcome.code == 1
    assert "project my-digits is archived" in outcome.err
    assert "nabla projects restore pj1" in outcome.err
    assert "Left out" not in outcome.err
    assert not server.calls("POST", "/filesets")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Reply(200, {"id": "pj0", "name": "old", "state": "deleted"}), "Project old, the last one in this folder, is"),
        (Reply(404, {"title": "Not found", "code": "project_not_found"}), "is gone"),
    ],
)
def test_a_deleted_project_is_followed_by_one_named_after_the_folder(
    nabla: Nabla, server: StubServer, folder: Path, answer: Reply, said: str
) -> None:
    serve_run(server)
    server.on("GET", "/projects/pj0", answer)
    Folders().remember(server.url, folder, "pj0")
    outcome = nabla("run", "--", "true")
    assert outcome.code == 0
    assert said in outcome.err
    assert "Project my-digits (created" in outcome.err
    assert Folders().project(server.url, folder) == "pj1"


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


FAILING = [line(n, f"line {n}") for n in range(1, 30)] + [line(30, "SystemExit: 3", "stderr")]
LAST = [f"  line {n}" for n in range(11, 30)] + ["  SystemExit: 3"]


def last_lines(err: str) -> list[str]:
    said = err.splitlines()
    return said[said.index("The last 20 lines:") + 1 :][:20]


def test_the_last_lines_are_said_again_where_the_log_itself_went_elsewhere(
    nabla: Nabla, server: StubServer, folder: Path
) -> None:
    serve_run(server, *FAILING, state="failed", exit_code=3)
    assert last_lines(nabla("run", "--", "false").err) == LAST


@pytest.mark.parametrize(("options", "again"), [((), 0), (("--json",), 1)])
def test_the_last_lines_are_not_said_twice_in_one_place(
    server: StubServer, folder: Path, options: tuple[str, ...], again: int
) -> None:
    serve_run(server, *FAILING, state="failed", exit_code=3)
    done = process("run", *options, "--", "false", stderr=subprocess.STDOUT)
    assert done.returncode == 3
    assert done.stdout.count("The last 20 lines:") == again
    assert done.stdout.count("SystemExit: 3") == 1 + again
    assert done.stdout.splitlines()[-1].startswith("Job js1 failed with exit code 3")


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, with the streams that it has then."""
    client = Path(__file__).parents[3] / "libs" / "client"
    return subprocess.run(
        [sys.executable, "-c", "from nabla.cli import main; main()", *arguments],
        env={**os.environ, "PYTHONPATH": str(client), **options.pop("env", {})},
        text=True,
        timeout=60,
        check=False,
        **{"stdout": subprocess.PIPE, **options},
    )


def test_whoever_comes_back_late_gets_the_last_lines_too(nabla: Nabla, server: StubServer) -> None:
    page = [{"sequence": n, "text": f"line {n}"} for n in range(11, 30)] + [{"sequence": 30, "text": "SystemExit: 3"}]
    server.on(
        "GET", "/jobs/js1/logs", Reply(200, {"lines": page[-1:], "last_sequence": 30}), Reply(200, {"lines": page})
    )
    serve_run(server, FAILING[-1], state="failed", exit_code=3)
    outcome = nabla("jobs", "attach", "js1", "--tail", "1")
    assert outcome.code == 3
    assert last_lines(outcome.err) == LAST


def test_following_only_the_log_of_a_job_that_fails_ends_with_the_reason_and_a_hint(
    nabla: Nabla, server: StubServer
) -> None:
    lines = [{"sequence": n, "text": f"line {n}"} for n in range(11, 30)]
    server.on("GET", "/jobs/js1/logs", Reply(200, {"lines": lines, "last_sequence": 29}))
    serve_run(server, line(30, "ModuleNotFoundError: No module named 'x'", "stderr"), state="failed", exit_code=1)
    outcome = nabla("jobs", "logs", "js1", "--follow")
    assert outcome.code == 0
    assert last_lines(outcome.err)[0] == "  line 11"
    assert "Job js1 failed with exit code 1" in outcome.err
    assert outcome.err.count("Hint:") == 1


def test_no_line_at_all_is_wished_and_none_but_new_ones_come(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/jobs/js1/logs", lambda seen: Reply(200, {"lines": [], "last_sequence": 7}))
    serve_run(server, line(8, "new"))
    assert nabla("jobs", "logs", "js1", "--follow", "--tail", "0").out == "new\n"
    assert server.seen[-1].query["after"] == "7"


REFUSED = (
    "HTTPConnectionPool(host='127.0.0.1', port=8333): Max retries exceeded with url: /nabla (Caused by "
    "NewConnectionError(\"HTTPConnection(host='127.0.0.1', port=8333): Failed to establish a new connection: "
    '[Errno 111] Connection refused")).'
)


def test_a_store_that_starts_after_the_rest_is_waited_for_in_one_clean_line(
    nabla: Nabla, server: StubServer, folder: Path
) -> None:
    serve_run(server)
    detail = f"Nothing can be uploaded now: The object store at 127.0.0.1:8333 does not do its work: {REFUSED}"
    starting = Reply(503, {"title": "Not available right now", "detail": detail})
    server.on("POST", "/filesets", starting, starting, Reply(201, {"fileset": {"id": "fs1", "state": "sealed"}}))
    outcome = nabla("run", "--", "true")
    assert outcome.code == 0
    said = [text for text in outcome.err.splitlines() if "object store" in text]
    assert len(said) == 1
    assert re.fullmatch(
        "Nothing can be uploaded now: The object store at 127.0.0.1:8333 does not do its work: Connection refused. "
        r"Trying again until \d\d:\d\d:\d\d\.",
        said[0],
    )


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (f"It is away: {REFUSED}", "It is away: Connection refused."),
        (f"It is away: {REFUSED[:120]}.", "It is away: it does not answer."),
        (
            "It is away: HTTPConnectionPool(host='x', port=1): Read timed out. (read timeout=20).",
            "It is away: Read timed out.",
        ),
        (
            "It is away: ('Connection aborted.', RemoteDisconnected('Remote end closed connection without response')).",
            "It is away: Remote end closed.",
        ),
        ("It is away:\n  HTTP 500", "It is away: HTTP 500"),
    ],
)
def test_the_insides_of_a_servers_http_library_are_not_shown(raw: str, reason: str) -> None:
    assert one_line(raw) == reason


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
    def kind(*options: str) -> str:
        assert nabla("run", *options, "--", "true").code == 0
        return server.calls("POST", "/experiments")[-1].json["template"]["environment"]["kind"]  # type: ignore[index]

    (tmp_path / "venv").mkdir()
    serve_run(server)
    assert kind() == "default"
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "venv"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "1.home").write_text(str(tmp_path / "gone"))
    (tmp_path / "notes" / "2.home").write_text(str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "context.json").write_text(json.dumps({"installation_id": "our-own"}))
    monkeypatch.setattr(installations, "notes", lambda: tmp_path / "notes")
    server.on("GET", "/health", Reply(200, {"installation_id": "our-own"}))
    assert kind() == "venv"
    assert kind("--env", "default") == "default"
    for other in ("behind-a-tunnel", ""):
        server.on("GET", "/health", Reply(200, {"installation_id": other}))
        assert kind() == "default"
    (folder / "needs.txt").write_text("numpy\n")
    assert kind("--env", "needs.txt", "--env", "A=1") == "requirements"


def installed(environment: Path, name: str, version: str, folder: Path | None = None, **files: str) -> None:
    """As an installer leaves it: a distribution's metadata in the environment, or in a `folder` of its own."""
    packages = next((environment / "lib").glob("python*")) / "site-packages"
    info = (folder or packages) / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (info / file.replace("_json", ".json")).write_text(text)
    if folder:
        (packages / f"{name}.pth").write_text(f"{folder}\n")


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment as uv makes them: without pip."""
    path = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True, timeout=60)
    return path


@pytest.mark.skipif(os.name != "posix", reason="the folders of an environment are others on Windows")
def test_an_active_environment_without_pip_goes_elsewhere_as_requirements(
    nabla: Nabla, server: StubServer, folder: Path, venv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editable = json.dumps({"url": "file:///src/mine", "dir_info": {"editable": True}})
    installed(venv, "numpy", "2.1.0")
    installed(venv, "torch", "2.4.0+cu118")
    installed(venv, "mkl_fft", "1.3", INSTALLER="conda\n", direct_url_json='{"url": "file:///home/conda/x"}')
    installed(venv, "mine", "0.1", direct_url_json=editable)
    installed(venv, "older", "0.2", tmp_path / "src")
    installed(venv, "nabla", "0.1.0")
    monkeypatch.setenv("VIRTUAL_ENV", str(venv))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    serve_run(server)
    server.on("GET", "/health", Reply(200, {"installation_id": "elsewhere"}))
    outcome = nabla("run", "--env", "active", "--", "true")
    assert outcome.code == 0, outcome.err
    sent = server.calls("POST", "/experiments")[0].json["template"]["environment"]  # type: ignore[index]
    assert sent["requirements"] == "mkl_fft==1.3\nnumpy==2.1.0\ntorch==2.4.0\n"
    assert "Left out (not from a package index): mine, older\n" in outcome.err
    assert "the 3 packages of" in outcome.err


@pytest.mark.parametrize("python", [None, "#!/bin/sh\necho broken >&2; exit 1\n"])
def test_an_environment_that_cannot_be_read_is_said_with_what_to_do(tmp_path: Path, python: str | None) -> None:
    if python:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python").write_text(python)
        (tmp_path / "bin" / "python").chmod(0o755)
    with pytest.raises(NablaError, match="broken" if python else "No such file") as caught:
        environment.freeze(tmp_path)
    assert "requirements.txt" in caught.value.remedy


def test_an_empty_environment_is_not_sent_for_the_server_to_refuse(
    nabla: Nabla, server: StubServer, folder: Path, venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", str(venv))
    server.on("GET", "/health", Reply(200, {"installation_id": "elsewhere"}))
    outcome = nabla("run", "--env", "active", "--", "true")
    assert outcome.code == 1
    assert "no package of" in outcome.err


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


def test_a_log_is_shown_however_little_the_terminal_can_write(server: StubServer, folder: Path) -> None:
    serve_run(server, line(1, "Gr\u00fc\u00dfe \u2192 \ud800"))
    windows = {"PYTHONIOENCODING": "cp1252"}
    done = process("run", "--", "true", env=windows, stderr=subprocess.PIPE, encoding="cp1252")
    assert (done.returncode, done.stdout) == (0, "Gr\u00fc\u00dfe \\u2192 \\ud800\n"), done.stderr


@pytest.mark.skipif(os.name != "posix", reason="closes a stream as a shell does")
def test_a_closed_standard_output_is_no_fault(server: StubServer, folder: Path) -> None:
    serve_run(server, line(1, "hello"))
    done = process("run", "--", "true", stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


def test_a_folder_whose_project_cannot_be_remembered_runs_all_the_same(
    nabla: Nabla, server: StubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NABLA_CONFIG", str(tmp_path / "file" / "config.json"))
    serve_run(server, line(1, "hello"))
    outcome = nabla("run", "--", "true")
    assert (outcome.code, outcome.out) == (0, "hello\n")
    assert "not remembered" in outcome.err


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that the system does not know, as in a container that runs under any number."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("NABLA_CONFIG", "NABLA_CACHE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder_all_works_that_needs_none(nabla: Nabla, server: StubServer, folder: Path) -> None:
    serve_run(server, line(1, "hello"))
    outcome = nabla("run", "--", "true")
    assert (outcome.code, outcome.out) == (0, "hello\n"), outcome.err
    assert "not remembered" in outcome.err
    assert nabla("run", "--project", "p", "--", "true").code == 0
    assert "You have no home folder" not in nabla("doctor").out


@pytest.mark.usefixtures("homeless")
def test_a_missing_home_folder_is_said_where_it_is_needed(nabla: Nabla, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/usr")
    for command in (("whoami",), ("contexts", "list"), ("logout",), ("jobs", "list", "--context", "x")):
        outcome = nabla(*command)
        assert outcome.code == 1
        assert "You have no home folder" in outcome.err
        assert "NABLA_CONFIG" in outcome.err


def test_ctrl_c_while_a_job_is_submitted_says_that_it_may_be_there(
    nabla: Nabla, server: StubServer, folder: Path
) -> None:
    def interrupt(seen: Seen) -> Reply:
        os.kill(os.getpid(), 2)
        return Reply(cut=True)

    serve_run(server)
    server.on("POST", "/experiments", interrupt)
    outcome = nabla("run", "--", "true")
    assert outcome.code == 130
    assert "nabla jobs list" in outcome.err


@pytest.mark.parametrize("below", [".", "sub/folder"])
def test_a_home_folder_behind_a_link_and_one_that_holds_it_are_asked_about(
    nabla: Nabla, server: StubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    (folder / below).mkdir(parents=True, exist_ok=True)
    (tmp_path / "link").symlink_to(folder / below)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "link")
    refused = nabla("run", "--", "true")
    assert refused.code == 2
    assert "your home folder" in refused.err
    assert not server.seen


@pytest.mark.skipif(os.name != "posix", reason="Windows tells of a broken pipe in another way")
def test_a_reader_that_leaves_early_is_told_that_the_job_goes_on(server: StubServer, folder: Path) -> None:
    serve_run(server, line(1, "a"), line(2, "b"))
    read, write = os.pipe()
    os.close(read)
    try:
        done = process("run", "--", "true", stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert "nabla jobs attach js1" in done.stderr
    assert "Traceback" not in done.stderr
