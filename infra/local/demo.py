"""The demo: one model from code to answers, on real parts, told as it happens."""

from __future__ import annotations

import csv
import gzip
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.local.console import refuse, say, show_up
from infra.local.installation import Installation
from infra.local.settings import CHECKOUT, LocalSettings
from nabla import Client
from nabla.errors import NablaError
from nabla.objects import Deployment, Job, LogLine, ModelVersion

EXAMPLE = CHECKOUT / "examples" / "digits"
PROJECT = "digits"
DEPLOYMENT = "digits"
SHOWN = 10
NODE_TIMEOUT_S = 180.0


class DemoError(Exception):
    """A step did not end as it must: what happened and where to look."""


def main(settings: LocalSettings) -> int:
    """Runs every step and prints where to go on; exit code 1 with the reason when a step fails."""
    started = time.monotonic()
    try:
        installation = show_up(settings)
        with Client(installation.front_door, token(installation)) as client:
            wait_for_node(client)
            job = train(client)
            version = registered_model(client, job)
            deployment = deploy(client, version)
            right = predict(client, deployment)
            close(client, installation, deployment, job=job, right=right, seconds=time.monotonic() - started)
    except (NablaError, DemoError) as error:
        refuse(error)
        return 1
    return 0


def token(installation: Installation) -> str:
    return (installation.keys / "api-token").read_text().strip()


@contextmanager
def step(title: str) -> Iterator[None]:
    """Prints the step's title, and how long it took."""
    say(f"\n── {title}")
    began = time.monotonic()
    yield
    say(f"   ({time.monotonic() - began:.1f} s)")


def wait_for_node(client: Client) -> None:
    """Jobs may be submitted before Ray is up; waiting here only makes the log easier to read."""
    with step("Ray, its first node, and the object store"):
        deadline, told = time.monotonic() + NODE_TIMEOUT_S, ""
        while time.monotonic() < deadline:
            status = client.status()
            ready = [node for node in status.nodes if node.state == "ready"]
            if ready and all(service.ready for service in status.services):
                node = ready[0]
                say(f"   {node.hostname}: {node.cpu_count:g} CPUs, {node.gpu_count:g} GPUs, isolation {node.isolation}")
                return
            waiting = [f"{service.name}: {service.detail}" for service in status.services if not service.ready]
            why = waiting[0] if ready and waiting else status.nodes_detail
            if why != told:
                told = why
                say(f"   waiting: {told}")
            time.sleep(0.25)
        raise DemoError(f"No node came up in {NODE_TIMEOUT_S:.0f} s: {told}. Look at `nabla doctor`.")


def train(client: Client) -> Job:
    """Submits examples/digits as an experiment and follows its log to the end."""
    with step("Experiment: training on scikit-learn's handwritten digits"):
        project, _ = client.projects.ensure(PROJECT)
        job = client.jobs.run(["python", "train.py"], project=project.id, name="digits", folder=EXAMPLE)
        say(f"   job {job.id}")
        for event in client.jobs.watch(job.id):
            if isinstance(event, LogLine):
                say(f"   │ {event.text}")
            else:
                job = event
        if job.state != "succeeded":
            raise DemoError(f"The job {job.id} is {job.state}: {job.detail}. Its log: `nabla jobs logs {job.id}`.")
        accuracy = client.jobs.tracked(job.id).metrics.get("test_accuracy")
        if accuracy is None:
            raise DemoError(f"The job {job.id} has logged no test_accuracy.")
        say(f"   test accuracy {accuracy:.1%}")
    return job


def registered_model(client: Client, job: Job) -> ModelVersion:
    with step("Model repository"):
        version = client.models.version(PROJECT)
        if version.job_id != job.id:
            raise DemoError(f"The newest version of the model is from job {version.job_id}, not from {job.id}.")
        say(f"   {version.model_name}:{version.version}, {version.framework}, {version.size_bytes / 1e3:.0f} kB")
    return version


def deploy(client: Client, version: ModelVersion) -> Deployment:
    """Deploys the new version; an older deployment of the demo makes room first."""
    with step("Deployment through BentoML"):
        remove_older(client)
        client.deployments.create(
            DEPLOYMENT, project=version.project_id, model=f"{version.model_name}:{version.version}"
        )
        deployment = client.deployments.wait(
            DEPLOYMENT, on_change=lambda now: say(f"   {now.state}: {now.detail}".rstrip(": "))
        )
        if deployment.state != "ready":
            raise DemoError(f"The deployment is {deployment.state}: {deployment.detail}")
    return deployment


def remove_older(client: Client) -> None:
    if any(found.name == DEPLOYMENT and found.state != "deleted" for found in client.deployments.list()):
        client.deployments.delete(DEPLOYMENT)
        deadline = time.monotonic() + 60
        while any(found.name == DEPLOYMENT and found.state != "deleted" for found in client.deployments.list()):
            if time.monotonic() > deadline:
                raise DemoError("The deployment of an earlier demo is not going away.")
            time.sleep(0.2)


def predict(client: Client, deployment: Deployment) -> int:
    """Sends real digits, of the part that was not trained on, and shows the answers beside the truth."""
    with step("Predictions of the endpoint beside the true labels"):
        pixels, labels = real_digits(SHOWN)
        answer = client.predict(deployment.name, pixels)
        predictions = [int(value) for value in _list(answer, "predictions")]
        for row in drawn(pixels):
            say(f"   {row}")
        say("   true       " + "".join(f"{label:<9}" for label in labels))
        say("   predicted  " + "".join(f"{value:<9}" for value in predictions))
    return sum(value == label for value, label in zip(predictions, labels, strict=True))


def _list(answer: dict[str, object], key: str) -> list[int]:
    value = answer.get(key)
    if not isinstance(value, list) or len(value) != SHOWN:
        raise DemoError(f"The endpoint answered {str(answer)[:200]}")
    return value


def real_digits(count: int) -> tuple[list[list[float]], list[int]]:
    """The last digits of the data set, which the example keeps for testing: 64 pixels of 0 to 16, and the label."""
    files = sorted((CHECKOUT / ".venv-serving").glob("lib/python3*/site-packages/sklearn/datasets/data/digits.csv.gz"))
    if not files:
        raise DemoError("scikit-learn's digits are not where they are installed: .venv-serving. Run `make demo`.")
    with gzip.open(files[0], "rt", newline="") as file:
        rows = list(csv.reader(file))[-count:]
    return [[float(value) for value in row[:64]] for row in rows], [int(float(row[64])) for row in rows]


def drawn(pixels: list[list[float]]) -> list[str]:
    """Eight lines that show the digits side by side."""
    shades = " ░▒▓█"
    rows = []
    for line in range(8):
        cells = ("".join(shades[min(4, int(v) // 4)] for v in digit[line * 8 : line * 8 + 8]) for digit in pixels)
        rows.append("           " + " ".join(cells))
    return rows


def close(
    client: Client, installation: Installation, deployment: Deployment, *, job: Job, right: int, seconds: float
) -> None:
    link = client.sign_in_link()
    say(f"\n{right} of {SHOWN} right. The whole way took {seconds:.0f} s.\n")
    say(f"  Web interface  {link.url}   (signs in once)")
    say(f"  Draw a digit   {installation.ui}/deployments/{deployment.name}/draw")
    say(f"  API            {installation.ui}/api/docs")
    say(f"  Endpoint       {installation.front_door}{deployment.path}/predict\n")
    say("Three commands to go on with:")
    for command in commands(Path(sys.executable).parent / "nabla", job.id, deployment.name, real_digits(1)[0]):
        say(f"  {command}")
    say("\n`make down` stops everything and keeps it; `make up` starts it again.")


def commands(nabla: Path, job_id: str, deployment: str, rows: list[list[float]]) -> list[str]:
    """Command lines that work when pasted, from whatever folder: nobody knows here where the person's shell is."""
    whole = json.dumps([[int(value) for value in row] for row in rows])
    arguments = (
        ["jobs", "logs", job_id],
        ["run", "--project", PROJECT, "--no-workspace", "--", "python", "-c", "print(6 * 7)"],
        ["predict", deployment, "--json-data", whole],
    )
    return [shlex.join([str(nabla), *each]) for each in arguments]
