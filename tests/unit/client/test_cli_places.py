"""Which workspace and which environment a command line means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import Nabla
from .stub import StubServer, serve_run

pytestmark = pytest.mark.unit


def sent(server: StubServer) -> dict[str, Any]:
    template = server.calls("POST", "/experiments")[-1].json["template"]
    assert isinstance(template, dict)
    return template


def test_a_repository_is_fetched_by_the_node_and_nothing_is_sent(
    nabla: Nabla, server: StubServer, folder: Path
) -> None:
    serve_run(server)
    url = "git+https://example.org/me/code.git"
    options = ("--ref", "v1", "--workspace-username", "me", "--workspace-password", "secret:GIT")
    assert nabla("run", "--workspace", url, *options, "--", "python", "train.py").code == 0
    assert not server.calls("POST", "/filesets")
    template = sent(server)
    assert template["source"] == {
        "kind": "git",
        "url": "https://example.org/me/code.git",
        "ref": "v1",
        "username": "me",
        "password": "secret:GIT",
        "endpoint": "",
    }
    assert template["workspace_id"] == ""
    assert template["origin"] == {"url": "https://example.org/me/code.git", "ref": "v1"}


def test_an_archive_comes_from_a_bucket(nabla: Nabla, server: StubServer, folder: Path) -> None:
    serve_run(server)
    nabla("run", "--workspace", "s3://b/k.zip", "--endpoint", "https://s3.example.org", "--", "true")
    assert (sent(server)["source"]["kind"], sent(server)["source"]["url"]) == ("s3", "s3://b/k.zip")


def test_another_folder_may_be_the_workspace(nabla: Nabla, server: StubServer, folder: Path) -> None:
    serve_run(server)
    (folder / "sub").mkdir()
    (folder / "sub" / "a.py").write_text("1")
    assert nabla("run", "--workspace", "sub", "--", "true").code == 0
    assert sent(server)["origin"]["folder"] == "sub"
    assert "is not a folder" in nabla("run", "--workspace", "none", "--", "true").err


@pytest.mark.parametrize(
    "options",
    [
        ("--ref", "main"),
        ("--endpoint", "https://x"),
        ("--workspace", "git+https://x/y", "--endpoint", "https://x"),
        ("--workspace", "s3://b/k", "--ref", "main"),
        ("--workspace", "git+https://x/y", "--no-workspace"),
        ("--workspace", "https://x/y"),
        ("--workspace-username", "me"),
        ("--env", "default", "--requirements", "r.txt"),
        ("--env", "active", "--python", "3.12"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    nabla: Nabla, server: StubServer, folder: Path, options: tuple[str, ...]
) -> None:
    serve_run(server)
    assert nabla("run", *options, "--", "true").code == 2
    assert not server.calls("POST", "/experiments")


PYPROJECT = "[project]\nname='x'\ndependencies=['numpy']\n"


@pytest.mark.parametrize(
    ("files", "options", "kind", "path", "python"),
    [
        ({}, (), "default", "", ""),
        ({"requirements.txt": "a"}, (), "workspace", "requirements.txt", ""),
        ({"requirements.txt": "a", "uv.lock": ""}, (), "workspace", "uv.lock", ""),
        ({"requirements.txt": "a"}, ("--env", "default"), "default", "", ""),
        ({"requirements.txt": "a"}, ("--no-workspace",), "default", "", ""),
        ({"requirements.txt": "a"}, ("--python", "3.12"), "workspace", "requirements.txt", "3.12"),
        ({}, ("--python", "3.12"), "default", "", "3.12"),
        ({"pyproject.toml": "[tool.ruff]\n"}, (), "default", "", ""),
        ({"e/r.txt": "a"}, ("--requirements", "e/r.txt"), "workspace", "e/r.txt", ""),
        ({"pyproject.toml": PYPROJECT}, ("--requirements", "pyproject.toml[x]"), "workspace", "pyproject.toml[x]", ""),
        ({"r.txt": "a"}, ("--no-workspace", "--requirements", "r.txt"), "requirements", "r.txt", ""),
        ({"r.txt": "a"}, ("--env", "r.txt"), "requirements", "r.txt", ""),
        ({}, ("--workspace", "git+https://x/y", "--requirements", "r.txt"), "workspace", "r.txt", ""),
    ],
)
def test_an_environment_is_what_was_named_else_what_the_workspace_asks_for(
    nabla: Nabla,
    server: StubServer,
    folder: Path,
    files: dict[str, str],
    options: tuple[str, ...],
    kind: str,
    path: str,
    python: str,
) -> None:
    serve_run(server)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    outcome = nabla("run", *options, "--", "true")
    assert outcome.code == 0, outcome.err
    found = sent(server)["environment"]
    assert (found["kind"], found["path"], found["python"]) == (kind, path, python)
    chosen = kind == "workspace" and not {"--requirements"} & {*options}
    assert (f"built from {path}" in outcome.err) == chosen


def test_a_folder_over_the_limit_is_refused_before_anything_is_sent(
    nabla: Nabla, server: StubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_run(server)
    (folder / "big").write_bytes(b"x" * 3000)
    monkeypatch.setenv("NABLA_WORKSPACE_BYTES", "2000")
    outcome = nabla("run", "--", "true")
    assert outcome.code == 1
    assert "is the most for a workspace" in outcome.err
    assert not server.calls("POST", "/filesets")
