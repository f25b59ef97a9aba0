"""Gangs on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Nabla
from .stub import JOB, Reply, StubServer, serve_run

pytestmark = pytest.mark.unit
RUN = ("experiments", "run", "multinode", "--no-workspace", "--project", "p")


def sent(nabla: Nabla, server: StubServer, *words: str) -> dict[str, object]:
    serve_run(server)
    assert nabla(*RUN, *words).code == 0
    template = server.calls("POST", "/experiments")[-1].json["template"]
    assert isinstance(template, dict)
    return template


def roles(template: dict[str, object]) -> list[tuple[object, ...]]:
    gang = template["gang"]
    assert isinstance(gang, dict)
    return [
        (role["name"], role["count"], role.get("command", []), role.get("machine_type", "")) for role in gang["roles"]
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--workers", "3"), [("worker", 3)]),
        (("--type", "grpc", "--worker-count", "3", "--ps-count", "2"), [("master", 1), ("worker", 2), ("ps", 2)]),
        (("--type", "grpc", "--workers", "1", "--parameter-servers", "1"), [("master", 1), ("ps", 1)]),
        (("--type", "mpi", "--workers", "2"), [("master", 1), ("worker", 2)]),
        (("--type", "ray", "--workers", "2"), [("head", 1), ("worker", 2)]),
    ],
)
def test_each_type_has_its_roles_in_order(
    nabla: Nabla, server: StubServer, folder: Path, words: tuple[str, ...], expected: list[tuple[str, int]]
) -> None:
    template = sent(nabla, server, *words, "--", "python", "train.py")
    assert [role[:2] for role in roles(template)] == expected
    assert template["command"] == ["python", "train.py"]


def test_roles_have_commands_and_machine_types_of_their_own(nabla: Nabla, server: StubServer, folder: Path) -> None:
    words = ("--type", "grpc", "--workers", "2", "--parameter-servers", "1", "--worker-command", "python w.py")
    more = (
        "--parameter-server-command",
        "python ps.py",
        "--ps-machine-type",
        "cpu-1",
        "--master-command",
        "python m.py",
    )
    template = sent(nabla, server, *words, *more)
    assert roles(template) == [
        ("master", 1, ["python m.py"], ""),
        ("worker", 1, ["python w.py"], ""),
        ("ps", 1, ["python ps.py"], "cpu-1"),
    ]
    assert template["command"] == ["python m.py"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--workers", "2"), "There is nothing to run"),
        (("--workers", "2", "--parameter-servers", "1", "--", "x"), "--parameter-servers is for --type grpc"),
        (("--workers", "2", "--ps-command", "x", "--", "x"), "Something is said of the ps"),
        (("--", "x"), "Missing option '--workers'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_sent(
    nabla: Nabla, server: StubServer, folder: Path, words: tuple[str, ...], said: str
) -> None:
    outcome = nabla(*RUN, *words)
    assert outcome.code != 0
    assert said in outcome.err
    assert not server.calls("POST", "/experiments")


def test_the_log_tells_ranks_apart_and_shows_one_of_them_on_request(nabla: Nabla, server: StubServer) -> None:
    said = [{"sequence": 1, "text": "zero"}, {"sequence": 2, "text": "one", "rank": 1}]
    server.on("GET", "/jobs/js1/logs", Reply(200, {"lines": said, "last_sequence": 2}))
    assert nabla("jobs", "logs", "js1").out == "zero\n[rank 1] one\n"
    assert nabla("jobs", "logs", "js1", "--rank", "1").out == "[rank 1] one\n"
    assert nabla("jobs", "logs", "js1", "--rank", "0").out == "zero\n"


def test_get_shows_every_rank(nabla: Nabla, server: StubServer) -> None:
    members = [
        {"rank": 0, "role": "master", "node_id": "n1", "state": "running"},
        {"rank": 1, "role": "ps", "node_id": "n2", "state": "ended", "exit_code": 3, "reason": "exited"},
    ]
    job = JOB | {"attempt": {"id": "at1", "number": 1, "members": members}}
    server.on("GET", "/jobs/js1", Reply(200, {"job": job, "timeline": []}))
    shown = [" ".join(text.split()) for text in nabla("jobs", "get", "js1").out.splitlines()]
    assert "0 master running n1" in shown
    assert "1 ps ended 3 n2 exited" in shown
