"""SIGKILL in the middle of the demo: whatever dies, the way from code to a prediction still ends right."""

from __future__ import annotations

import time

import pytest

from infra.local import demo
from nabla import Client
from nabla.errors import NotFound
from nabla.objects import Job, JobTemplate, LogLine, ModelVersion
from services import SERVICES
from tests.support.platform import Platform

pytestmark = pytest.mark.chaos

SERVERS = ("nats", "ray", pytest.param("s3", marks=pytest.mark.full), pytest.param("traefik", marks=pytest.mark.full))


def trained_while_killing(platform: Platform, client: Client, victim: str) -> Job:
    """Runs examples/digits, kills `victim` when training has begun, and answers the ended job."""
    project, _ = client.projects.ensure(demo.PROJECT)
    job = client.jobs.run(["python", "train.py"], project=project.id, name="digits", folder=demo.EXAMPLE)
    killed = False
    numbers: list[int] = []
    for event in client.jobs.watch(job.id):
        if isinstance(event, LogLine):
            numbers.append(event.sequence)
            if event.stream == "stdout" and not killed:
                platform.kill(victim)
                killed = True
        else:
            job = event
    assert killed
    assert numbers == list(range(1, len(numbers) + 1)), "a line was lost or came twice"
    return job


def some_version(client: Client) -> ModelVersion:
    """A model to deploy: of an earlier test, or trained for this one."""
    try:
        return client.models.version(demo.PROJECT)
    except NotFound:
        return demo.registered_model(client, demo.train(client))


@pytest.mark.parametrize("victim", SERVICES)
def test_the_demo_ends_right_when_a_service_is_killed_in_its_middle(platform: Platform, victim: str) -> None:
    with platform.client(patience_s=90) as client:
        job = trained_while_killing(platform, client, victim)
        assert (job.state, job.attempt.number) == ("succeeded", 1), job.detail
        version = demo.registered_model(client, job)
        deployment = demo.deploy(client, version)
        assert demo.predict(client, deployment) >= demo.SHOWN - 1


@pytest.mark.full
@pytest.mark.parametrize("victim", SERVICES)
def test_the_demo_ends_right_when_a_service_is_killed_while_deploying(platform: Platform, victim: str) -> None:
    with platform.client(patience_s=90) as client:
        version = some_version(client)
        demo.remove_older(client)
        client.deployments.create(
            demo.DEPLOYMENT, project=version.project_id, model=f"{demo.PROJECT}:{version.version}"
        )
        platform.kill(victim)
        deployment = client.deployments.wait(demo.DEPLOYMENT, timeout_s=120)
        assert deployment.state == "ready", deployment.detail
        assert demo.predict(client, deployment) >= demo.SHOWN - 1


@pytest.mark.parametrize("victim", SERVERS)
def test_a_running_job_does_not_notice_the_death_of_a_server(platform: Platform, victim: str) -> None:
    with platform.client(patience_s=90) as client:
        project, _ = client.projects.ensure("kills")
        script = "for n in $(seq 1 60); do echo $n; sleep 0.1; done; echo done > $NABLA_ARTIFACTS/done"
        job = client.jobs.submit(project.id, JobTemplate(name="count", command=(script,)))
        lines: list[str] = []
        for event in client.jobs.watch(job.id):
            if isinstance(event, LogLine):
                lines += [event.text] if event.stream == "stdout" else []
                if event.text == "10":
                    platform.kill(victim)
            else:
                job = event
        assert (job.state, job.attempt.number) == ("succeeded", 1), job.detail
        assert lines == [str(n) for n in range(1, 61)]
        assert [file.path for file in client.jobs.artifacts(job.id)] == ["done"]


def test_a_job_submitted_while_ray_is_dead_waits_says_why_and_runs(platform: Platform) -> None:
    with platform.client(patience_s=90) as client:
        project, _ = client.projects.ensure("kills")
        platform.kill("ray")
        job = client.jobs.submit(project.id, JobTemplate(name="later", command=("echo at last",)))
        reasons: set[str] = set()
        deadline = time.monotonic() + 150
        while (now := client.jobs.get(job.id).job).state not in ("succeeded", "failed"):
            reasons.add(now.detail)
            assert time.monotonic() < deadline, reasons
            time.sleep(0.2)
        assert now.state == "succeeded", now.detail
        assert [line.text for line in client.jobs.logs(job.id) if line.stream == "stdout"] == ["at last"]


def test_down_and_up_keep_everything(platform: Platform) -> None:
    with platform.client() as client:
        before = {job.id: job.state for job in client.jobs.list(limit=50)}
        models = [model.id for model in client.models.list()]
        assert before
        assert models
    platform.down()
    platform.up()
    with platform.client() as client:
        assert {job.id: job.state for job in client.jobs.list(limit=50)} == before
        assert [model.id for model in client.models.list()] == models
