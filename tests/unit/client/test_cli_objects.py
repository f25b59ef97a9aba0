"""Commands on one kind of object: what they ask of the server, what they say to people and what to programs."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from nabla import paths
from nabla.contexts import ContextBook

from .conftest import Nabla
from .stub import Reply, Seen, StubServer

pytestmark = pytest.mark.unit

PROJECT = {"id": "pj1", "name": "digits", "state": "active", "team_id": "tm1"}
DEPLOYMENT = {
    "id": "dp1", "name": "digits", "state": "ready", "path": "/d/digits", "endpoint_token": "ep-secret",
    "revision": {"model_name": "digits", "model_version": 2},
}  # fmt: skip
VERSION = {"model_name": "digits", "version": 2, "fileset_id": "fs1", "size_bytes": 7}


@pytest.mark.parametrize(
    ("command", "method", "path", "body"),
    [
        (("update", "--name", "new"), "PATCH", "", {"name": "new"}),
        (("update", "--description", ""), "PATCH", "", {"description": ""}),
        (("archive",), "POST", "/archive", {}),
        (("restore",), "POST", "/restore", {}),
        (("move", "--team", "tm2"), "POST", "/move", {"team_id": "tm2"}),
        (("delete",), "DELETE", "", None),
    ],
)
def test_a_project_is_changed_and_shown(
    nabla: Nabla, server: StubServer, command: tuple[str, ...], method: str, path: str, body: object
) -> None:
    server.on(method, f"/projects/digits{path}", Reply(200, PROJECT))
    people = nabla("projects", command[0], "digits", *command[1:])
    assert (people.code, people.out) == (0, "pj1\n")
    assert people.err.endswith("d project 'digits'.\n")
    assert json.loads(server.seen[-1].body or b"null") == body
    programs = nabla("projects", command[0], "digits", *command[1:], "--json")
    assert (programs.code, programs.json["id"], programs.err) == (0, "pj1", "")  # type: ignore[index]


def test_a_project_is_not_updated_with_nothing(nabla: Nabla, server: StubServer) -> None:
    assert nabla("projects", "update", "digits").code == 2
    assert not server.seen


def test_open_prints_the_link_alone(nabla: Nabla, server: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    link = "http://localhost:8080/sign-in?code=x"
    server.on("POST", "/sign-in-links", Reply(201, {"url": link, "expires_at": "2026-01-01T00:10:00Z"}))
    people = nabla("open")
    assert (people.code, people.out) == (0, f"{link}\n")
    assert "once" in people.err
    assert opened == []
    programs = nabla("open", "--json", "--browser")
    assert programs.json == {"url": link, "expires_at": "2026-01-01T00:10:00Z"}
    assert opened == [link]


def test_a_token_is_shown_once_listed_without_its_secret_and_revoked(nabla: Nabla, server: StubServer) -> None:
    token = {"id": "tk1", "name": "laptop", "scopes": ["read"], "created_at": "2026-01-01T00:00:00Z"}
    server.on("POST", "/tokens", Reply(201, {**token, "secret": "nbl_s3cret"}))
    server.on("GET", "/tokens", Reply(200, {"items": [token], "next_cursor": ""}))
    server.on("DELETE", "/tokens/tk1", Reply(200, {**token, "revoked_at": "2026-01-02T00:00:00Z"}))
    made = nabla("tokens", "create", "laptop", "--scope", "read", "--lifetime", "30d")
    assert (made.code, made.out) == (0, "nbl_s3cret\n")
    assert "tk1" in made.err
    assert server.seen[-1].json == {"name": "laptop", "scopes": ["read"], "lifetime_s": 30 * 86400}
    assert nabla("tokens", "create", "laptop", "--json").json["secret"] == "nbl_s3cret"  # type: ignore[index]
    listed = nabla("tokens", "list")
    assert listed.out.splitlines()[1].split()[:3] == ["tk1", "laptop", "read"]
    assert nabla("tokens", "list", "--json").json[0]["id"] == "tk1"  # type: ignore[index]
    assert nabla("tokens", "revoke", "tk1") == (0, "", "Revoked tk1.\n")
    assert nabla("tokens", "revoke", "tk1", "--json").json["revoked_at"]  # type: ignore[index]


def test_contexts_are_used_and_deleted(nabla: Nabla, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/usr")
    book = ContextBook(paths.config_file())
    for name in ("a", "b", "c"):
        book.save(name, f"http://{name}:1", "t")
    assert nabla("contexts", "use", "a") == (0, "", "Using 'a'.\n")
    assert nabla("contexts", "use", "b", "--json").json == {"current": "b"}
    assert nabla("contexts", "delete", "a") == (0, "", "Forgot 'a'.\n")
    assert nabla("contexts", "delete", "b", "--json").json == {"context": "b", "deleted": True}
    left = nabla("contexts", "list", "--json").json
    assert [(c["name"], c["in_force"]) for c in left] == [("c", False)]  # type: ignore[attr-defined]
    for command in ("use", "delete"):
        missing = nabla("contexts", command, "a")
        assert missing.code == 1
        assert "known: c" in missing.err


def test_a_context_that_something_else_overrules_is_used_with_a_word_about_it(nabla: Nabla, server: StubServer) -> None:
    ContextBook(paths.config_file()).save("a", "http://a:1", "t")
    assert "NABLA_URL and NABLA_TOKEN comes first" in nabla("contexts", "use", "a").err


def listed(stub: StubServer, **contents: object) -> list[dict[str, object]]:
    """Files as a list of the API names them, with their bytes to fetch."""
    files = []
    for name, content in contents.items():
        data = json.dumps(content).encode()
        stub.on("GET", f"/s3/{name}", Reply(200, content))
        sha256 = hashlib.sha256(data).hexdigest()
        files.append({"path": f"out/{name}", "size_bytes": len(data), "sha256": sha256, "url": f"{stub.url}/s3/{name}"})
    return files


def test_artifacts_are_downloaded_into_a_folder_named_after_the_job(
    nabla: Nabla, server: StubServer, folder: Path
) -> None:
    server.on("GET", "/jobs/js1/artifacts", Reply(200, {"items": listed(server, a=1, b=22)}))
    people = nabla("artifacts", "download", "js1")
    assert (people.code, people.err) == (0, "2 files in js1.\n")
    assert people.out.splitlines() == [str(Path("js1/out/a")), str(Path("js1/out/b"))]
    assert (folder / "js1" / "out" / "b").read_text() == "22"
    programs = nabla("artifacts", "download", "js1", "--to", "elsewhere", "--json")
    assert programs.json == [str(Path("elsewhere/out/a")), str(Path("elsewhere/out/b"))]
    server.on("GET", "/jobs/js1/artifacts", Reply(200, {"items": []}))
    none = nabla("artifacts", "download", "js1")
    assert (none.code, none.out) == (0, "")
    assert "when the job has ended" in none.err


def test_a_models_version_is_downloaded(nabla: Nabla, server: StubServer, folder: Path) -> None:
    for version in (0, 2):
        server.on("GET", f"/models/digits/versions/{version}", Reply(200, VERSION))
    server.on("GET", "/filesets/fs1/files", Reply(200, {"items": listed(server, a="model")}))
    people = nabla("models", "download", "digits")
    assert (people.code, people.out, people.err) == (0, f"{Path('digits/out/a')}\n", "digits:2 in digits.\n")
    programs = nabla("models", "download", "digits:2", "--to", "here", "--json")
    assert programs.json["paths"] == [str(Path("here/out/a"))]  # type: ignore[index]
    assert programs.json["version"]["version"] == 2  # type: ignore[index]
    assert nabla("models", "download", "digits:newest").code == 2


@pytest.mark.skipif(os.name != "posix", reason="Windows has no symbolic links for ordinary users")
def test_a_model_is_uploaded_and_what_stays_here_is_named(
    nabla: Nabla, server: StubServer, folder: Path, tmp_path: Path
) -> None:
    def grant(seen: Seen) -> Reply:
        uploads = [{"path": f["path"], "url": f"{server.url}/s3/put"} for f in seen.json["files"]]  # type: ignore[attr-defined]
        return Reply(201, {"fileset": {"id": "fs1", "state": "open"}, "uploads": uploads})

    server.on("POST", "/filesets", grant)
    server.on("PUT", "/s3/put", Reply(200))
    server.on("POST", "/filesets/fs1/seal", Reply(200, {"id": "fs1", "state": "sealed"}))
    server.on("POST", "/models/digits/versions", Reply(201, VERSION))
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("weights")
    (folder / "model" / "linked").symlink_to(tmp_path)
    command = ("models", "upload", "model", "--name", "digits", "--framework", "sklearn", "--project", "p")
    people = nabla(*command, "--metric", "accuracy=0.9")
    assert (people.code, people.out) == (0, "digits:2\n")
    assert "Left out (links to folders, which are not followed): linked/\n" in people.err
    assert "nabla deployments create digits --model digits:2" in people.err
    sent = server.calls("POST", "/models/digits/versions")[-1].json
    assert (sent["project_id"], sent["fileset_id"], sent["metrics"]) == ("p", "fs1", {"accuracy": 0.9})
    assert nabla(*command, "--json").json["version"] == 2  # type: ignore[index]
    assert nabla(*command, "--metric", "accuracy=good").code == 2


def test_deployments_are_listed_shown_and_deleted(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/deployments", Reply(200, {"items": [DEPLOYMENT], "next_cursor": ""}))
    server.on("GET", "/deployments/digits", Reply(200, DEPLOYMENT))
    server.on("DELETE", "/deployments/digits", Reply(200, {**DEPLOYMENT, "state": "deleted"}))
    people = nabla("deployments", "list")
    assert people.out.splitlines()[1].split()[:4] == ["dp1", "digits", "ready", "digits:2"]
    assert nabla("deployments", "list", "--json").json[0]["name"] == "digits"  # type: ignore[index]
    shown = nabla("deployments", "get", "digits")
    assert f"{server.url}/d/digits/predict" in shown.out
    assert "ep-secret" in shown.out
    assert nabla("deployments", "get", "digits", "--json").json["endpoint_token"] == "ep-secret"  # type: ignore[index]
    assert nabla("deployments", "delete", "digits") == (0, "", "Deleting digits.\n")
    assert nabla("deployments", "delete", "digits", "--json").json["state"] == "deleted"  # type: ignore[index]
