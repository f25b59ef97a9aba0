"""What user code imports inside a job."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import nabla
from nabla.errors import Invalid, Unavailable
from nabla.job import metrics
from nabla.job.identity import JobIdentity
from nabla.job.metrics import Recorder

from .stub import Reply, Seen, StubServer

pytestmark = pytest.mark.unit

CLIENT = Path(__file__).parents[3] / "libs" / "client"
OLD_PYTHONS = ("3.8", "3.9")


@pytest.fixture
def sent() -> list[dict[str, object]]:
    return []


@pytest.fixture
def recorder(sent: list[dict[str, object]]) -> Recorder:
    return Recorder(sent.append, interval_s=0.01)


def points(sent: list[dict[str, object]]) -> list[tuple[object, object, object]]:
    return [(p["name"], p["value"], p["step"]) for body in sent for p in body["points"]]  # type: ignore[attr-defined]


def test_points_arrive_in_order_with_their_steps(recorder: Recorder, sent: list[dict[str, object]]) -> None:
    recorder.add({"loss": 0.5, "acc": 1}, 3)
    recorder.add({"loss": 0.4}, None)
    recorder.add_params({"lr": 0.1})
    assert recorder.flush(60)
    assert points(sent) == [("loss", 0.5, 3), ("acc", 1.0, 3), ("loss", 0.4, 4)]
    assert {"lr": "0.1"} in [body["params"] for body in sent]


def test_numpy_scalars_and_whatever_is_like_a_number_count(recorder: Recorder, sent: list[dict[str, object]]) -> None:
    class Scalar:
        def __float__(self) -> float:
            return 2.5

    recorder.add({"a": Scalar(), "b": True}, 1)
    assert recorder.flush(60)
    assert points(sent) == [("a", 2.5, 1), ("b", 1.0, 1)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many", None, [1]])
def test_what_is_no_finite_number_is_skipped_with_a_warning(recorder: Recorder, value: object) -> None:
    with pytest.warns(RuntimeWarning, match="'loss' is skipped"):
        recorder.add({"loss": value}, 1)


def test_a_full_buffer_drops_and_warns_once() -> None:
    sending, gate = threading.Event(), threading.Event()
    sent: list[dict[str, object]] = []

    def slow(body: dict[str, object]) -> None:
        sending.set()
        gate.wait(60)
        sent.append(body)

    recorder = Recorder(slow, capacity=10, interval_s=0.001)
    recorder.add({"x": 0}, 0)
    assert sending.wait(60)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 31):
            recorder.add({"x": step}, step)
        assert len([w for w in caught if "more than 10 points" in str(w.message)]) == 1
        gate.set()
        assert recorder.flush(60)
        assert any("20 points were dropped" in str(w.message) for w in caught)
    assert [p[2] for p in points(sent)] == list(range(11))


def test_logging_does_not_wait_for_the_network() -> None:
    sending, gate = threading.Event(), threading.Event()
    sent: list[dict[str, object]] = []

    def never(body: dict[str, object]) -> None:
        sending.set()
        gate.wait(60)
        sent.append(body)

    recorder = Recorder(never, interval_s=0.001)
    recorder.add({"x": 0}, 0)
    assert sending.wait(60)
    for step in range(1, 1000):
        recorder.add({"x": step}, step)
    assert not sent
    gate.set()
    assert recorder.flush(60)


def test_what_fails_for_now_is_sent_again_and_what_fails_for_good_is_dropped() -> None:
    sent: list[dict[str, object]] = []
    failures: list[Exception] = [
        Unavailable(503, {}),
        Unavailable(503, {}),
        Invalid(422, {"title": "No"}),
        KeyError("x"),
    ]

    def send(body: dict[str, object]) -> None:
        if failures:
            raise failures.pop(0)
        sent.append(body)

    recorder = Recorder(send, interval_s=0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(3):
            recorder.add({"x": step}, step)
            assert recorder.flush(60)
    assert points(sent) == [("x", 2.0, 2)]


@pytest.mark.parametrize(
    "call",
    [
        lambda: nabla.log({"loss": 1}),
        lambda: nabla.log_params({"lr": 1}),
        lambda: nabla.save_model("x", name="x", framework="x"),
        nabla.workspace,
        nabla.artifacts,
        nabla.storage,
    ],
)
def test_outside_a_job_the_error_says_what_to_do(call: Callable[[], object]) -> None:
    with pytest.raises(nabla.NotInJob) as caught:
        call()
    assert "nabla run" in caught.value.remedy


def in_job(stub: StubServer, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(CLIENT),
        "NABLA_API_URL": stub.url,
        "NABLA_TOKEN": "attempt-token",
        "NABLA_JOB_ID": "js1",
        "NABLA_PROJECT_ID": "pj1",
        "NABLA_ATTEMPT": "2",
        "NABLA_ARTIFACTS": str(tmp_path),
        "http_proxy": "http://proxy.invalid:3128",  # the job's own, for the world outside
        "no_proxy": "",
    }


def run_python(python: str, code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False)


WHOLE_JOB = """
import nabla, pathlib
for step in range(2500):
    nabla.log({"loss": 1.0 / (step + 1)}, step=step)
nabla.log_params({"lr": 0.1})
model = nabla.artifacts() / "model.bin"
model.write_bytes(b"weights")
version = nabla.save_model(model, name="digits", framework="sklearn", metrics={"accuracy": 0.9})
print(version.model_name, version.version)
"""


def serve_job(stub: StubServer) -> None:
    grant = {"fileset": {"id": "fs1", "state": "open"}, "uploads": [{"path": "model.bin", "url": f"{stub.url}/s3/m"}]}
    stub.on("POST", "/jobs/js1/metrics", Reply(503), Reply(200, {"job_id": "js1"}))
    stub.on("POST", "/filesets", Reply(cut=True), Reply(201, grant))
    stub.on("PUT", "/s3/m", Reply(500), Reply(503), Reply(200))
    stub.on("POST", "/filesets/fs1/seal", Reply(200, {"id": "fs1", "state": "sealed"}))
    stub.on("POST", "/models/digits/versions", Reply(201, {"model_name": "digits", "version": 1}))


def pythons() -> list[str]:
    """This one, and the oldest ones where they are installed."""
    root = Path(os.environ.get("PYENV_ROOT") or "/root/.pyenv") / "versions"
    old = [str(next(iter(sorted(root.glob(f"{v}.*/bin/python"))), f"python{v}")) for v in OLD_PYTHONS]
    return [sys.executable, *old]


@pytest.mark.parametrize("python", pythons(), ids=["this", *OLD_PYTHONS])
def test_a_whole_job_needs_only_the_standard_library(python: str, stub: StubServer, tmp_path: Path) -> None:
    if not any((Path(folder) / python).exists() for folder in ("/", *os.get_exec_path())):
        pytest.skip(f"{python} is not installed on this machine")
    serve_job(stub)
    done = run_python(python, WHOLE_JOB, in_job(stub, tmp_path))
    assert (done.returncode, done.stdout) == (0, "digits 1\n"), done.stderr
    steps = [p["step"] for seen in accepted(stub) for p in seen.json["points"]]  # type: ignore[attr-defined]
    assert steps == list(range(2500))
    opened = stub.calls("POST", "/filesets")
    assert len({seen.headers["idempotency-key"] for seen in opened}) == 1
    assert (opened[-1].json["job_id"], opened[-1].json["attempt"]) == ("js1", 2)
    assert opened[-1].json["files"][0]["sha256"] == hashlib.sha256(b"weights").hexdigest()  # type: ignore[index]
    assert [seen.body for seen in stub.seen if seen.method == "PUT"][-1] == b"weights"
    assert stub.calls("POST", "/models/digits/versions")[0].json["metrics"] == {"accuracy": 0.9}


def accepted(stub: StubServer) -> list[Seen]:
    """Each batch once, however often it was sent."""
    batches = {seen.headers["idempotency-key"]: seen for seen in stub.calls("POST", "/jobs/js1/metrics")}
    return list(batches.values())


def test_a_training_loop_survives_a_server_that_refuses(stub: StubServer, tmp_path: Path) -> None:
    stub.on("POST", "/jobs/js1/metrics", Reply(403, {"title": "Forbidden", "detail": "the attempt has ended"}))
    code = "import nabla\nnabla.log({'x': 1})\nnabla.log(5)\nprint('done')"
    done = run_python(sys.executable, code, in_job(stub, tmp_path))
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "metrics were refused: Forbidden: the attempt has ended" in done.stderr


FORKING = """
import nabla, os
nabla.log({"parent": 1})
child = os.fork()
if child == 0:
    nabla.log({"child": 1})
    os._exit(0 if nabla.flush() else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_sends_its_own_points_and_not_its_parents(stub: StubServer, tmp_path: Path) -> None:
    stub.on("POST", "/jobs/js1/metrics", Reply(200, {}))
    done = run_python(sys.executable, FORKING, in_job(stub, tmp_path))
    assert done.stdout == "0\n", done.stderr
    names = [p["name"] for seen in accepted(stub) for p in seen.json["points"]]  # type: ignore[attr-defined]
    assert sorted(names) == ["child", "parent"]


LISTING = """
import sys, json
before = set(sys.modules)
import nabla
after = set(sys.modules) - before
nabla.log, nabla.save_model, nabla.NablaError
every = set(sys.modules) - before
print(json.dumps([sorted(after), sorted(every)]))
"""


def test_import_nabla_loads_nothing_and_the_job_part_no_third_party_module() -> None:
    done = run_python(sys.executable, LISTING, {**os.environ, "PYTHONPATH": str(CLIENT)})
    first, every = json.loads(done.stdout)
    assert first == ["nabla"]
    foreign = {name.split(".")[0] for name in every} - set(sys.stdlib_module_names) - {"nabla"}
    assert not foreign


def test_the_buffer_and_the_thread_are_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recorder] = []
    monkeypatch.setattr(metrics, "_recorder", None)
    monkeypatch.setattr(metrics, "_build", lambda identity: made.append(Recorder(lambda body: None)) or made[-1])
    for name in ("API_URL", "TOKEN", "JOB_ID"):
        monkeypatch.setenv(f"NABLA_{name}", "http://x")
    for _ in range(3):
        nabla.log({"x": 1})
    assert len(made) == 1


def test_a_batch_that_outlasts_all_patience_keeps_its_key(
    stub: StubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(metrics, "PATIENCE_S", 0.0)
    monkeypatch.setattr(metrics.atexit, "register", lambda function: None)
    stub.on("POST", "/jobs/js1/metrics", Reply(cut=True), Reply(503), Reply(200, {}))
    recorder = metrics._build(JobIdentity.from_environment(in_job(stub, tmp_path)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorder.add({"loss": 1}, 0)
        assert recorder.flush(60)
        recorder.add({"loss": 2}, 1)
        assert recorder.flush(60)
    keys = [seen.headers["idempotency-key"] for seen in stub.calls("POST", "/jobs/js1/metrics")]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]


def test_a_model_whose_urls_grow_old_is_sent_on_with_new_ones(
    stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in in_job(stub, tmp_path).items():
        monkeypatch.setenv(name, value)
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    urls = [{"path": name, "url": f"{stub.url}/s3/{name}"} for name in ("a", "b")]
    fileset = {"id": "fs1", "state": "open"}
    grants = [Reply(201, {"fileset": fileset, "uploads": uploads}) for uploads in (urls, urls[1:])]
    stub.on("POST", "/filesets", *grants)
    stub.on("PUT", "/s3/a", Reply(200))
    stub.on("PUT", "/s3/b", Reply(403), Reply(200))
    stub.on("POST", "/filesets/fs1/seal", Reply(200, {"id": "fs1", "state": "sealed"}))
    stub.on("POST", "/models/m/versions", Reply(201, {"model_name": "m", "version": 1}))
    assert nabla.save_model(tmp_path, name="m", framework="sklearn").version == 1
