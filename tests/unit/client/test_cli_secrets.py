"""nabla secrets: where a value may come from, and that it goes to the server and nowhere else."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import click
import pytest

from .conftest import Nabla
from .stub import Reply, StubServer

pytestmark = pytest.mark.unit

TEAMS = {"id": "sc1", "name": "HF_TOKEN", "team_id": "tm1", "version": 2, "updated_by": "us1"}
PROJECTS = {**TEAMS, "id": "sc2", "project_id": "pj1", "version": 1}
VALUE = "correct horse\nbattery staple"


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def from_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(("end", "kept"), [("", ""), ("\n", ""), ("\r\n", ""), ("\n\n", "\n")])
@pytest.mark.parametrize("options", [(), ("--from-file", "-")])
def test_a_value_comes_from_standard_input_without_its_last_line_end(
    nabla: Nabla,
    server: StubServer,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    kept: str,
    options: tuple[str, ...],
) -> None:
    from_stdin(monkeypatch, (VALUE + end).encode())
    server.on("PUT", "/secrets/HF_TOKEN", Reply(200, TEAMS))
    done = nabla("secrets", "set", "HF_TOKEN", *options)
    assert (done.code, done.out) == (0, "")
    assert server.seen[-1].json == {"value": VALUE + kept, "project_id": ""}
    assert "Set HF_TOKEN of the team, version 2" in done.err
    assert "correct" not in done.err


def test_a_file_is_taken_as_it_is(nabla: Nabla, server: StubServer, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(b"-----BEGIN\nabc\n")
    server.on("PUT", "/secrets/KEY", Reply(200, PROJECTS))
    done = nabla("secrets", "set", "KEY", "--project", "digits", "--from-file", str(tmp_path / "key.pem"), "--json")
    assert server.seen[-1].json == {"value": "-----BEGIN\nabc\n", "project_id": "digits"}
    assert done.json["version"] == 1  # type: ignore[index]
    assert "BEGIN" not in done.out + done.err


def test_on_a_terminal_the_value_is_asked_for_and_not_shown(
    nabla: Nabla, server: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))
    asked: list[str] = []

    def typed(prompt: str = "") -> str:
        asked.append(prompt)
        return "typed value"

    monkeypatch.setattr(click.termui, "hidden_prompt_func", typed)
    server.on("PUT", "/secrets/HF_TOKEN", Reply(200, TEAMS))
    done = nabla("secrets", "set", "HF_TOKEN")
    assert (done.code, len(asked)) == (0, 1)
    assert server.seen[-1].json == {"value": "typed value", "project_id": ""}
    assert "typed" not in done.out + done.err


@pytest.mark.parametrize("arguments", [("HF_TOKEN=hunter2",), ("HF_TOKEN", "hunter2")])
def test_a_value_on_the_command_line_is_refused(nabla: Nabla, server: StubServer, arguments: tuple[str, ...]) -> None:
    done = nabla("secrets", "set", *arguments)
    assert done.code == 2
    assert not server.seen


def test_the_refusal_says_why_and_what_to_write(nabla: Nabla, server: StubServer) -> None:
    done = nabla("secrets", "set", "HF_TOKEN=hunter2")
    assert "history" in done.err
    assert "`nabla secrets set HF_TOKEN`" in done.err
    assert "hunter2" not in done.err


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_what_cannot_be_a_value_is_told(
    nabla: Nabla, server: StubServer, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "value"
    if content is not None:
        file.write_bytes(content)
    done = nabla("secrets", "set", "A", "--from-file", str(file))
    assert done.code != 0
    assert str(file) in done.err
    assert not server.seen


def test_a_list_has_names_owners_and_versions(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/secrets", Reply(200, {"items": [PROJECTS, TEAMS]}))
    people = nabla("secrets", "list", "--project", "digits")
    assert server.seen[-1].query["project_id"] == "digits"
    assert [line.split()[:3] for line in people.out.splitlines()[1:]] == [
        ["HF_TOKEN", "project", "pj1"],
        ["HF_TOKEN", "the", "team"],
    ]
    assert [secret["version"] for secret in nabla("secrets", "list", "--json").json] == [1, 2]  # type: ignore[attr-defined,index]
    server.on("GET", "/secrets", Reply(200, {"items": []}))
    assert "nabla secrets set NAME" in nabla("secrets", "list").err


def test_a_deletion_names_the_jobs_that_will_miss_it(nabla: Nabla, server: StubServer) -> None:
    waiting = [
        {"id": "js1", "template": {"env": {"A": "secret:HF_TOKEN"}}},
        {"id": "js2", "template": {"env": {"A": "secret:OTHER"}, "command": ["secret:HF_TOKEN"]}},
        {"id": "js3", "template": {"gang": {"roles": [{"container": {"registry_password": "secret:HF_TOKEN"}}]}}},
    ]
    server.on("DELETE", "/secrets/HF_TOKEN", Reply(200, TEAMS))
    jobs = {"queued": waiting, "waiting": [], "submitted": []}
    server.on("GET", "/jobs", lambda seen: Reply(200, {"items": jobs[seen.query["state"]]}))
    done = nabla("secrets", "delete", "HF_TOKEN")
    assert done.code == 0
    assert "Deleted HF_TOKEN of the team." in done.err
    assert "js1, js3." in done.err
    assert "js2" not in done.err


def test_a_job_names_a_secret_by_an_ordinary_variable(nabla: Nabla, server: StubServer, folder: Path) -> None:
    server.on("POST", "/projects", Reply(201, {"id": "pj1", "name": "p", "state": "active"}))
    job = {"id": "js1", "state": "queued"}
    server.on("POST", "/experiments", Reply(201, {"id": "ex1", "jobs": [job]}))
    done = nabla("run", "--no-workspace", "--detach", "--env", "A=secret:HF_TOKEN", "--", "python", "train.py")
    assert done.code == 0, done.err
    sent = server.calls("POST", "/experiments")[0].json
    assert sent["template"]["env"] == {"A": "secret:HF_TOKEN"}  # type: ignore[index]
