"""What people are told of the queue, and what is asked of the server for it."""

from __future__ import annotations

import pytest

from .conftest import Nabla
from .stub import JOB, Reply, StubServer, serve_run

pytestmark = pytest.mark.unit

EXPLANATION = {
    "job_id": "js1",
    "state": "queued",
    "summary": "It needs 3 CPUs. Waits for 3 CPUs to become free on one node; 1 job waits before it.",
    "priority": 50,
    "before": 1,
    "waiting": 2,
    "nodes": [
        {
            "node_id": "n1",
            "hostname": "anna",
            "total": {"cpu_count": 4, "gpu_count": 1, "gpu_model": "H100"},
            "free": {"cpu_count": 1, "gpu_count": 0.5, "gpu_model": "H100"},
            "obstacle": "is in use",
        }
    ],
    "holders": [{"job_id": "js0", "name": "big", "state": "running", "holds": {"cpu_count": 2}}],
    "held_by_others": {"cpu_count": 1},
}


def test_explain_says_it_in_words_and_shows_what_is_free(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/jobs/js1/explain", Reply(200, EXPLANATION))
    people = nabla("jobs", "explain", "js1")
    assert people.code == 0
    assert people.out.startswith(EXPLANATION["summary"])
    lines = [" ".join(line.split()) for line in people.out.splitlines()]
    assert "in the queue 1 of 2 waiting jobs come before it" in lines
    assert "other teams hold 1 CPU" in lines
    assert "anna 1 CPU, 0.5 H100 GPUs 4 CPUs, 1 H100 GPU is in use" in lines
    assert "js0 big running 2 CPUs" in lines
    assert nabla("jobs", "explain", "js1", "--json").json["before"] == 1  # type: ignore[index]


def test_explain_of_a_job_that_does_not_wait_is_a_sentence(nabla: Nabla, server: StubServer) -> None:
    server.on("GET", "/jobs/js1/explain", Reply(200, {"state": "failed", "summary": "It has failed: exit code 3"}))
    assert nabla("jobs", "explain", "js1").out == "It has failed: exit code 3\n"


def test_timeline_shows_who_why_and_for_how_long(nabla: Nabla, server: StubServer) -> None:
    entries = [
        {"at": f"2026-01-01T00:00:{at}Z", "state": state, "actor": actor, "cause": cause, "trace_id": "abc"}
        for at, state, actor, cause in (
            ("00.000", "submitted", "ada", "submitted"),
            ("00.010", "queued", "scheduler", "admitted"),
            ("10.010", "running", "executor", "started"),
            ("15.010", "failed", "executor", "out_of_memory"),
        )
    ]
    server.on("GET", "/jobs/js1", Reply(200, {"job": {**JOB, "state": "failed"}, "timeline": entries}))
    people = nabla("jobs", "timeline", "js1")
    rows = [line.split()[2:] for line in people.out.splitlines()[1:]]
    assert rows == [
        ["submitted", "10", "ms", "ada", "submitted"],
        ["queued", "10.0", "s", "█" * 20, "scheduler", "admitted"],
        ["running", "5.0", "s", "█" * 10, "executor", "started"],
        ["failed", "executor", "out_of_memory"],
    ]
    assert people.err == "Trace: abc\n"
    assert len(nabla("jobs", "timeline", "js1", "--json").json) == 4  # type: ignore[arg-type]


def test_retry_and_clone_print_the_new_job(nabla: Nabla, server: StubServer) -> None:
    server.on("POST", "/jobs/js1/retry", Reply(201, {**JOB, "id": "js2"}))
    server.on("POST", "/jobs/js1/clone", Reply(201, {**JOB, "id": "js3"}))
    assert nabla("jobs", "retry", "js1").out == "js2\n"
    made = nabla(
        "jobs", "clone", "js1", "--env", "LR=0.1", "--gpus", "0.5", "--timeout", "0", "--", "python", "-u", "a.py"
    )
    assert (made.code, made.out) == (0, "js3\n")
    body = server.seen[-1].json
    resources = body.pop("resources")
    assert body == {"command": ["python", "-u", "a.py"], "env": {"LR": "0.1"}, "timeout_s": 0.0}
    assert resources["gpu_count"] == 0.5  # type: ignore[index]
    assert nabla("jobs", "clone", "js1", "--env", "LR").code == 2


def test_machines_are_a_table(nabla: Nabla, server: StubServer) -> None:
    kind = {
        "name": "gpu-h100-1",
        "resources": {"cpu_count": 8, "memory_bytes": 1 << 34, "gpu_count": 1, "gpu_model": "H100"},
        "startable": 3,
        "hostnames": ["anna"],
    }
    server.on("GET", "/machines", Reply(200, {"items": [kind], "source": "nodes"}))
    row = nabla("machines").out.splitlines()[1].split()
    assert (row[0], row[1], row[-4:]) == ("gpu-h100-1", "8", ["1", "H100", "3", "anna"])
    server.on("GET", "/machines", Reply(200, {"items": []}))
    assert "No node has reported yet" in nabla("machines").err


@pytest.mark.usefixtures("folder")
def test_a_submission_says_what_the_queue_needs_to_know(nabla: Nabla, server: StubServer) -> None:
    serve_run(server)
    options = (
        "--priority", "0", "--machine-type", "gpu-h100-1", "--gpu-model", "H100", "--gpu-memory", "40G", "--max-wait",
        "2h", "--retries", "2", "--retry-on", "exit:3", "--retry-on", "node_lost", "--retry-delay", "10s",
    )  # fmt: skip
    assert nabla("run", "--detach", "--no-workspace", *options, "--", "true").code == 0
    template = server.calls("POST", "/experiments")[0].json["template"]
    assert isinstance(template, dict)
    assert (template["priority"], template["machine_type"], template["max_wait_s"]) == (0, "gpu-h100-1", 7200.0)
    assert template["resources"]["gpu_model"] == "H100"
    assert template["resources"]["gpu_memory_bytes"] == 40 << 30
    assert template["retry"] == {"on": ["exit:3", "node_lost"], "delay_s": 10.0, "longest_s": 0.0}
