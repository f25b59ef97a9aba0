"""The programs of build and replica jobs, run for real: BentoML, scikit-learn, and models that are no good."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from libs.common.contracts.messages import Resources
from libs.common.ids import secret_hash
from services.serving.adapters.programs import programs
from services.serving.domain.templates import build_template, replica_template
from tests.support.ports import free_port

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-serving" / "bin" / "python"
TOKEN = "nble_of-a-test"
DIGITS = """
import asyncio
import json
from sklearn.datasets import load_digits
data = load_digits()
print(json.dumps([data.data[:20].tolist(), data.target[:20].tolist()]))
"""

if not PYTHON.exists():
    pytest.skip("the serving environment is not installed: make demo", allow_module_level=True)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As a job runs it: with an environment made from nothing."""
    return subprocess.run(
        [str(PYTHON), *arguments],
        env=job_environment(**environment),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def job_environment(**more: str) -> dict[str, str]:
    return {
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
    } | more


def build(folder: Path, framework: str = "sklearn") -> subprocess.CompletedProcess[str]:
    """A build job of the model in folder/model."""
    template = build_template(
        programs(), name="digits", framework=framework, model="digits", version=1, fileset_id="fs1"
    )
    return run_python(*template.command[1:], **build_environment(folder))


def build_environment(folder: Path) -> dict[str, str]:
    """Where a build job of this folder finds its model, leaves its artifacts, and writes what it needs meanwhile."""
    for name in ("artifacts", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    return {
        "NABLA_WORKSPACE": str(folder),
        "NABLA_ARTIFACTS": str(folder / "artifacts"),
        "TMPDIR": str(folder / "tmp"),
    }


def left_in(folder: Path) -> list[str]:
    """What a build of this folder has left of its scratch files."""
    return [path.name for path in (folder / "tmp").glob("nabla-*")]


@dataclass(frozen=True)
class Replica:
    url: str

    def post(self, body: object, **headers: str) -> httpx.Response:
        authorization = {"Authorization": f"Bearer {TOKEN}"}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(f"{self.url}/predict", headers=authorization | given, json=body, timeout=30)


@contextmanager
def running_replica(workspace: Path, log: Path) -> Iterator[Replica]:
    """A replica job whose inputs were laid into `workspace`, as the executor does it."""
    port = free_port()
    template = replica_template(
        programs(),
        name="digits",
        bento_fileset_id="fs2",
        token_hash=secret_hash(TOKEN),
        port=port,
        resources=Resources(),
    )
    environment = job_environment(NABLA_WORKSPACE=str(workspace), TMPDIR=str(log.parent), **template.env)
    with log.open("ab") as output:
        command = [str(PYTHON), *template.command[1:]]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    replica = Replica(f"http://127.0.0.1:{port}")
    try:
        _wait_until_ready(replica, process, log)
        yield replica
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(replica: Replica, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{replica.url}/readyz").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise TimeoutError(log.read_text())


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """The example, trained outside of Nabla, built and served once for this module.

    The bento lies where an input that holds all artifacts puts it.
    """
    folder = tmp_path_factory.mktemp("replica")
    example = str(ROOT / "examples" / "digits" / "train.py")
    trained = run_python(example, NABLA_ARTIFACTS=str(folder / "trained"))
    assert trained.returncode == 0, trained.stderr
    assert "test accuracy 9" in trained.stdout
    assert "rows: truth" in (folder / "trained" / "report.txt").read_text()
    (folder / "model").mkdir()
    (folder / "trained" / "model.joblib").rename(folder / "model" / "model.joblib")
    built = build(folder)
    assert built.returncode == 0, built.stderr
    assert left_in(folder) == []
    workspace = folder / "workspace"
    workspace.mkdir()
    (folder / "artifacts").rename(workspace / "bento")
    with running_replica(workspace, folder / "replica.log") as running:
        yield running


def test_real_digits_are_predicted(replica: Replica) -> None:
    rows, labels = json.loads(run_python("-c", DIGITS).stdout)
    answer = replica.post({"inputs": rows})
    assert answer.status_code == 200
    right = sum(given == label for given, label in zip(answer.json()["predictions"], labels, strict=True))
    assert right >= 19
    assert [len(row) for row in answer.json()["probabilities"]] == [10] * 20
    assert all(abs(sum(row) - 1) < 1e-6 for row in answer.json()["probabilities"])


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {secret_hash(TOKEN)}"]
)
def test_without_the_token_nothing_is_predicted(replica: Replica, authorization: str) -> None:
    answer = replica.post({"inputs": [[0.0] * 64]}, Authorization=authorization)
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "endpoint token" in answer.json()["remedy"]


@pytest.mark.parametrize(
    "kind",
    [
        "application/vnd.bentoml+pickle",
        "application/vnd.bentoml+pickle; charset=utf-8",
        "Application/VND.BentoML+Pickle",
        "application/x-pickle",
        "multipart/form-data; boundary=x",
        "text/plain",
    ],
)
def test_bodies_that_are_not_json_are_refused(replica: Replica, kind: str) -> None:
    assert replica.post({"inputs": [[0.0] * 64]}, Content_Type=kind).status_code == 415


def test_a_second_content_type_does_not_get_past_the_first(replica: Replica) -> None:
    headers = [
        ("Authorization", f"Bearer {TOKEN}"),
        ("Content-Type", "application/json"),
        ("Content-Type", "application/vnd.bentoml+pickle"),
    ]
    assert httpx.post(f"{replica.url}/predict", headers=headers, content=b"{}").status_code == 415


@pytest.mark.parametrize(
    "body", [{"inputs": [[1.0, 2.0]]}, {"inputs": []}, {"inputs": [["a"] * 64]}, {"rows": []}, [], "x", None]
)
def test_inputs_the_model_cannot_take_are_a_400(replica: Replica, body: object) -> None:
    assert replica.post(body).status_code == 400


def test_a_wrong_request_does_not_fail_those_it_is_batched_with(replica: Replica) -> None:
    async def mixed() -> list[int]:
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30) as client:
            good, bad = {"inputs": [[0.0] * 64]}, {"inputs": [[0.0] * 63]}
            sent = [client.post(f"{replica.url}/predict", json=body) for body in [good, bad] * 20]
            return [answer.status_code for answer in await asyncio.gather(*sent)]

    assert asyncio.run(mixed()) == [200, 400] * 20


def test_health_and_description_are_open_and_all_else_needs_the_token(replica: Replica) -> None:
    for path in ("/livez", "/readyz", "/", "/docs.json"):
        assert httpx.get(replica.url + path).status_code == 200, path
    for path in ("/metrics", "/other"):
        assert httpx.get(replica.url + path).status_code == 401, path
    assert "/predict" in httpx.get(f"{replica.url}/docs.json").json()["paths"]


def test_a_taken_port_ends_the_replica_at_once(replica: Replica, tmp_path: Path) -> None:
    port = replica.url.rsplit(":", 1)[1]
    ended = run_python("-c", programs().replica, port, NABLA_WORKSPACE=str(tmp_path))
    assert ended.returncode == 98
    assert f"Port {port} is taken" in ended.stderr


@pytest.mark.parametrize(
    ("files", "framework", "reason"),
    [
        ({}, "sklearn", "this one holds nothing"),
        ({"model.joblib": b"no pickle at all"}, "sklearn", "model.joblib cannot be loaded: "),
        ({"model.pkl": b""}, "sklearn", "model.pkl cannot be loaded: EOFError"),
        ({"a.joblib": b"", "b.pkl": b""}, "sklearn", "this one holds a.joblib, b.pkl"),
        ({"model.pkl": b"cno_such_module\nthing\n."}, "sklearn", "needs the module 'no_such_module'"),
        ({"model.pkl": b"I7\n."}, "sklearn", "holds a int, which has no predict()"),
        ({"model.pt": b"x"}, "pytorch", "The framework 'pytorch' cannot be served yet"),
    ],
)
def test_a_model_that_is_no_good_is_refused_with_the_reason_last(
    tmp_path: Path, files: dict[str, bytes], framework: str, reason: str
) -> None:
    (tmp_path / "model").mkdir()
    for name, content in files.items():
        (tmp_path / "model" / name).write_bytes(content)
    ended = build(tmp_path, framework)
    assert ended.returncode == 1
    assert reason in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "artifacts" / "bento").exists()
    assert left_in(tmp_path) == []


# Loading it stops the program that loads it, as a job is stopped.
STOPPED = b"cos\nkill\n(cos\ngetpid\n(tRI15\ntR."
LEAVES_BY_ITSELF = b"csys\nexit\n(I3\ntR."


@pytest.mark.parametrize(("model", "code"), [(STOPPED, 143), (LEAVES_BY_ITSELF, 3)])
def test_a_build_that_is_broken_off_leaves_nothing_behind(tmp_path: Path, model: bytes, code: int) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.pkl").write_bytes(model)
    ended = build(tmp_path)
    assert ended.returncode == code, ended.stderr
    assert left_in(tmp_path) == []


def test_the_programs_fit_into_a_command(tmp_path: Path) -> None:
    template = build_template(
        programs(), name="n" * 63, framework="sklearn", model="m" * 200, version=1, fileset_id="fs"
    )
    assert sum(len(part) for part in template.command) < 100 * 1024
