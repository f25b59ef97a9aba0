"""Two machines of one platform: Ray's head dies below running jobs of both, and one machine dies with its job."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from nabla import Client
from nabla.objects import Attempt, Job, JobTemplate, Node, Resources, Retry
from services.executor.settings import ExecutorSettings
from tests.support.leftovers import left_by
from tests.support.links import linked_namespace, why_no_links
from tests.support.machines import Machine, joined
from tests.support.platform import Platform, running_platform

WHY_NOT = why_no_links()
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
# As people have it: Ray must be back on both machines before that.
FENCE_S = ExecutorSettings.model_fields["node_fence_s"].default
COUNTS = 240
ANY = Retry()
COUNTING = f"for n in $(seq {COUNTS}); do echo $n; sleep 0.5; done"

T = TypeVar("T")


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Platform, Machine]]:
    with linked_namespace() as link, tempfile.TemporaryDirectory(prefix="nabla-two-") as folder:
        settings = {"host": "0.0.0.0", "node_address": link.here, "gpus": "2"}
        with (
            running_platform(Path(folder) / "home", **settings) as platform,
            joined(platform, link, Path(folder) / "far", "--gpus", "4", "--cpus", "1") as far,
        ):
            yield platform, far


def test_jobs_on_both_machines_outlive_the_head_of_ray(both: tuple[Platform, Machine]) -> None:
    platform, _ = both
    with platform.client(patience_s=120) as client:
        project = client.projects.ensure("two-machines")[0].id
        nodes = eventually(partial(two_ready, client), "two nodes")
        # What asks for four GPUs fits on the far machine alone.
        jobs = [submitted(client, project, gpus, COUNTING) for gpus in (4, 2)]
        for job in jobs:
            eventually(partial(said, client, job.id), "a first line")
        platform.kill("ray")
        ends = [ended(client, job.id) for job in jobs]
        for job in ends:
            assert (job.state, of(job).number) == ("succeeded", 1), client.jobs.get(job.id).timeline
            assert said(client, job.id) == [str(n) for n in range(1, COUNTS + 1)]
        assert {of(job).node_id for job in ends} <= {node.id for node in nodes + two_ready(client)}
        eventually(partial(two_ready, client), "both nodes again")
        again = [submitted(client, project, gpus, "echo back") for gpus in (4, 2)]
        assert [ended(client, job.id).state for job in again] == ["succeeded"] * 2
        attempts = [of(job).id for job in (*ends, *(client.jobs.get(job.id).job for job in again))]
        eventually(lambda: not left_by(attempts, []), "nothing left")


def test_a_job_whose_machine_dies_is_tried_again_elsewhere_as_its_policy_says(both: tuple[Platform, Machine]) -> None:
    platform, far = both
    with platform.client(patience_s=120) as client:
        project = client.projects.ensure("two-machines")[0].id
        eventually(partial(two_ready, client), "two nodes")
        holds = submitted(client, project, 2, "sleep 600")
        eventually(lambda: client.jobs.get(holds.id).job.state == "running", "the job that holds the near GPUs")
        command = "echo attempt $NABLA_ATTEMPT; [ $NABLA_ATTEMPT = 2 ] || sleep 600"
        moves = submitted(client, project, 1, command)
        stays = submitted(client, project, 1, command, retry=Retry(on=("failure",)))
        for job in (moves, stays):
            eventually(partial(said, client, job.id), "a first line")
        first = {job.id: of(client.jobs.get(job.id).job) for job in (moves, stays)}
        far_node = next(node.id for node in two_ready(client) if node.address == far.link.there)
        assert {attempt.node_id for attempt in first.values()} == {far_node}
        client.jobs.stop(holds.id)

        far.lose_power()
        began = time.monotonic()
        moved, stayed = ended(client, moves.id), ended(client, stays.id)
        assert time.monotonic() - began > FENCE_S, "tried again while the first attempt might have lived"
        assert (moved.state, of(moved).number) == ("succeeded", 2), moved.detail
        assert of(moved).node_id != far_node
        assert said(client, moves.id) == ["attempt 1", "attempt 2"]
        states = [(entry.attempt, entry.state) for entry in client.jobs.get(moves.id).timeline]
        assert states.index((1, "running")) < states.index((2, "running")), states
        assert any("out of contact" in entry.detail for entry in client.jobs.get(moves.id).timeline)
        assert (stayed.state, of(stayed).number) == ("failed", 1), stayed.detail
        assert "out of contact" in stayed.detail
        assert said(client, stays.id) == ["attempt 1"]
        attempts = [of(moved).id, *(attempt.id for attempt in first.values())]
        eventually(lambda: not left_by(attempts, []), "nothing left")


def submitted(client: Client, project: str, gpus: int, command: str, retry: Retry = ANY) -> Job:
    resources = Resources(gpu_count=gpus, cpu_count=0.1)
    return client.jobs.submit(project, JobTemplate(name="far", command=(command,), resources=resources, retry=retry))


def of(job: Job) -> Attempt:
    assert job.attempt
    return job.attempt


def two_ready(client: Client) -> list[Node]:
    found = [node for node in client.nodes.list() if node.state == "ready"]
    return found if len(found) == 2 else []


def said(client: Client, job_id: str) -> list[str]:
    return [line.text for line in client.jobs.logs(job_id) if line.stream == "stdout"]


def ended(client: Client, job_id: str) -> Job:
    *_, last = client.jobs.watch(job_id)
    assert isinstance(last, Job)
    return last


def eventually(find: Callable[[], T], what: str, limit_s: float = 120.0) -> T:
    deadline = time.monotonic() + limit_s
    while not (found := find()):
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:.0f} s"
        time.sleep(0.2)
    return found
