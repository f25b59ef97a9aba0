"""Endpoints as people and programs meet them: what they refuse, how they fail, and how they come back."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import time
from pathlib import Path

import httpx
import pytest

from infra.local import demo
from nabla import Client
from nabla.objects import Deployment
from services import SERVICES
from tests.support.platform import Platform

pytestmark = pytest.mark.e2e

FORBIDDEN_MODULES = re.compile(r"sklearn|scipy|joblib|numpy|bentoml|\.joblib|\.pkl")


ROW = json.dumps({"inputs": [[0.0] * 64]}).encode()
JSON = "application/json"


def ask(
    platform: Platform, deployment: Deployment, *, token: str | None = None, body: bytes = ROW, kind: str = JSON
) -> httpx.Response:
    """POST /predict as a program does; with the endpoint's own token unless another is given."""
    token = deployment.endpoint_token if token is None else token
    headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {token}"} if token else {})
    return httpx.post(f"{platform.url}{deployment.path}/predict", content=body, headers=headers, timeout=30)


def test_the_endpoint_is_right_about_real_digits(client: Client, digits: Deployment) -> None:
    assert demo.predict(client, digits) >= demo.SHOWN - 1


def test_the_command_line_predicts(platform: Platform, digits: Deployment) -> None:
    pixels, labels = demo.real_digits(3)
    done = platform.command("predict", digits.name, "--json-data", json.dumps(pixels))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(labels)
    assert all(line.isdigit() for line in done.stdout.split())


@pytest.mark.parametrize("token", ["", "nbl_wrong", "nble_" + "x" * 43])
def test_without_the_right_token_nothing_is_answered(platform: Platform, digits: Deployment, token: str) -> None:
    answer = ask(platform, digits, token=token)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["remedy"]


def test_a_pickle_is_refused_unread(platform: Platform, digits: Deployment) -> None:
    for kind in ("application/vnd.bentoml+pickle", "application/octet-stream", "multipart/form-data; boundary=x"):
        answer = ask(platform, digits, body=pickle.dumps([1]), kind=kind)
        assert answer.status_code == 415, kind
        assert "JSON" in answer.json()["remedy"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"inputs": [[1.0, 2.0]]}, "64"),
        ({"inputs": []}, "rows"),
        ({"inputs": [["a"] * 64]}, "number"),
        ({"rows": [[0.0] * 64]}, "inputs"),
    ],
)
def test_wrong_input_is_refused_in_words(platform: Platform, digits: Deployment, body: object, told: str) -> None:
    answer = ask(platform, digits, body=json.dumps(body).encode())
    assert 400 <= answer.status_code < 500
    assert told in answer.text


def test_predict_with_the_wrong_shape_is_a_sentence_for_people(platform: Platform, digits: Deployment) -> None:
    done = platform.command("predict", digits.name, "--json-data", "[[1, 2]]")
    assert done.returncode == 1
    assert "64" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_model_file_fails_with_the_reason_and_the_log(platform: Platform, folder: Path) -> None:
    (folder / "model.joblib").write_text("this is no model")
    upload = ("models", "upload", "model.joblib", "--name", "bad", "--framework", "sklearn")
    done = platform.command(*upload, cwd=folder)
    assert done.returncode == 0, done.stderr
    done = platform.command("deployments", "create", "bad", "--model", "bad", "--wait", cwd=folder, timeout_s=60)
    assert done.returncode == 1, done.stdout
    assert "cannot be loaded" in done.stderr
    assert "failed" in done.stdout
    with platform.client() as client:
        failed = client.deployments.get("bad")
        assert failed.state == "failed"
        assert "model.joblib" in failed.detail
        assert "loading model.joblib" in failed.detail, "the log's last lines"
        log = [line.text for line in client.jobs.logs(failed.revision.build_job_id)]  # type: ignore[union-attr]
        assert any("cannot be loaded" in line for line in log)


@pytest.mark.full
def test_a_killed_replica_is_replaced_by_itself(platform: Platform, client: Client, digits: Deployment) -> None:
    before = client.deployments.get(digits.name)
    assert before.revision
    job = client.jobs.get(before.revision.replica_job_id).job
    shim = json.loads((platform.home / "node" / "attempts" / job.attempt.id / "shim.json").read_text())
    os.kill(shim["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    gone = False
    while True:
        status = ask(platform, digits).status_code
        gone = gone or status != 200
        if gone and status == 200:
            break
        assert time.monotonic() < deadline, (status, client.deployments.get(digits.name))
        time.sleep(0.1)
    assert client.deployments.wait(digits.name, timeout_s=30).state == "ready"


def test_no_service_ever_loads_a_model(platform: Platform, digits: Deployment) -> None:
    """Neither the libraries that a model needs nor a model's file is mapped into any of our processes."""
    pids = platform.children()
    for name in SERVICES:
        mapped = Path(f"/proc/{pids[name]}/maps").read_text()
        assert FORBIDDEN_MODULES.findall(mapped) == [], name


@pytest.mark.full
def test_deleting_takes_the_route_away_and_ends_the_replica(platform: Platform, client: Client) -> None:
    version = client.models.version(demo.PROJECT)
    client.deployments.create("short-lived", project=version.project_id, model=f"{demo.PROJECT}:{version.version}")
    deployment = client.deployments.wait("short-lived", timeout_s=90)
    assert deployment.state == "ready", deployment.detail
    assert ask(platform, deployment).status_code == 200
    done = platform.command("deployments", "delete", "short-lived")
    assert done.returncode == 0, done.stderr
    assert client.deployments.wait(deployment.id, timeout_s=60).state == "deleted"
    assert ask(platform, deployment).status_code == 404
    assert deployment.revision
    assert client.jobs.get(deployment.revision.replica_job_id).job.state == "cancelled"
    assert "short-lived" not in platform.command("deployments", "list").stdout
