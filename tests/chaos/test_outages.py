"""NATS gone for long while jobs run: none notices, and what came up meanwhile arrives after, in order and once."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from nabla import Client
from nabla.objects import Attempt, Job, JobTemplate, LogLine, Resources
from tests.support.holding import HeldNats
from tests.support.leftovers import left_by
from tests.support.platform import Platform

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

SMALL = Resources(cpu_count=0.2)
TALKS = "n=0; while [ ! -e $NABLA_STORAGE/go ]; do n=$((n+1)); echo $n; sleep 0.05; done; echo $n > $NABLA_ARTIFACTS/n"
ENDS = (
    "echo up; while [ ! -e $NABLA_STORAGE/end ]; do sleep 0.05; done; "
    "echo bye; echo kept > $NABLA_ARTIFACTS/kept; exit 3"
)
TRACKS = (
    "import nabla, os, pathlib, time\n"
    "go, n = pathlib.Path(os.environ['NABLA_STORAGE'], 'go'), 0\n"
    "print('up', flush=True)\n"
    "while not go.exists():\n"
    "    nabla.log({'n': n}, step=n)\n"
    "    n += 1\n"
    "    time.sleep(0.25)\n"
    "print(n)\n"
)
# How far apart two readings of what a job uses may be: they are taken every few seconds.
USAGE_GAP_S = 30


@pytest.fixture(autouse=True)
def back_again(nats: HeldNats) -> Iterator[None]:
    yield
    nats.give_back()


@pytest.mark.parametrize("away_s", [12, pytest.param(600, marks=pytest.mark.full)])
def test_what_came_up_while_nats_was_away_arrives_in_order_and_once(
    platform: Platform, nats: HeldNats, away_s: int
) -> None:
    with platform.client(patience_s=away_s + 90) as client, ThreadPoolExecutor(2) as pool:
        project, name = client.projects.ensure("outages")[0].id, f"sent-{away_s}"
        # The node that an earlier test left behind may count for a moment: from here on no attempt is lost.
        ended(client, client.jobs.submit(project, JobTemplate(name="before", command=("true",), resources=SMALL)))
        talks, ends, tracks = (
            client.jobs.submit(project, JobTemplate(name=name, command=command, resources=SMALL))
            for name, command in (("talks", (TALKS,)), ("ends", (ENDS,)), ("tracks", ("python3", "-c", TRACKS)))
        )
        storage = platform.home / "storage" / talks.team_id
        for job in (talks, ends, tracks):
            eventually(partial(said, client, job), f"a line of {job.template.name}")
        followed = pool.submit(lambda: list(client.jobs.watch(talks.id)))

        nats.take_away(platform)
        began = time.monotonic()
        time.sleep(away_s / 3)
        (storage / "end").touch()
        submitted = pool.submit(
            client.jobs.submit, project, JobTemplate(name=name, command=("echo at last",), resources=SMALL)
        )
        time.sleep(max(0.0, began + away_s - time.monotonic()))
        assert not submitted.done(), "taken without a bus to commit by"
        nats.give_back()
        eventually(lambda: client.jobs.get(ends.id).job.ended, "the end that came up meanwhile")
        (storage / "go").touch()

        jobs = {job.id: ended(client, job) for job in (talks, ends, tracks, submitted.result(60))}
        for job in jobs.values():
            told = [(entry.state, entry.detail) for entry in client.jobs.get(job.id).timeline]
            assert (job.state, of(job).number) == ("failed" if job.id == ends.id else "succeeded", 1), told
        assert jobs[ends.id].exit_code == 3
        last = int(downloaded(client, talks, "n", platform.home.parent))
        numbers = [str(n) for n in range(1, last + 1)]
        assert said(client, talks) == numbers
        assert [each.text for each in heard(followed) if each.stream == "stdout"] == numbers
        assert said(client, ends) == ["up", "bye"]
        assert downloaded(client, ends, "kept", platform.home.parent) == "kept"
        (series,) = client.jobs.metrics(tracks.id, "n", max_points=100_000)
        assert [point.step for point in series.points] == list(range(int(said(client, tracks)[-1])))
        eventually(lambda: usage_gap_s(client, talks) < USAGE_GAP_S, "what it used, without a gap")
        submissions = [job.id for job in client.jobs.list(project, limit=50) if job.template.name == name]
        assert len(submissions) == 1
        for job in jobs.values():
            states = [entry.state for entry in client.jobs.get(job.id).timeline]
            # In a long outage it is unreachable for a while, and says so.
            assert [state for state in states if state in ("queued", "starting", job.state)] == [
                "queued",
                "starting",
                job.state,
            ]
        eventually(lambda: not left_by([of(job).id for job in jobs.values()], []), "nothing left")
        for file in ("go", "end"):
            (storage / file).unlink()


def said(client: Client, job: Job) -> list[str]:
    return [line.text for line in client.jobs.logs(job.id) if line.stream == "stdout"]


def heard(followed: Future[list[LogLine | Job]]) -> list[LogLine]:
    return [event for event in followed.result(60) if isinstance(event, LogLine)]


def of(job: Job) -> Attempt:
    assert job.attempt
    return job.attempt


def ended(client: Client, job: Job) -> Job:
    *_, last = client.jobs.watch(job.id)
    assert isinstance(last, Job)
    return last


def downloaded(client: Client, job: Job, name: str, folder: Path) -> str:
    paths = client.jobs.download_artifacts(job.id, folder / job.id)
    return next(path for path in paths if path.name == name).read_text().strip()


def usage_gap_s(client: Client, job: Job) -> float:
    """The longest time without a reading of what the job uses; endless while there are not two."""
    series = client.jobs.usage(job.id, newest=1000)
    steps = sorted({point.step for each in series for point in each.points})
    return max((after - before for before, after in itertools.pairwise(steps)), default=math.inf)


def eventually(find: Callable[[], object], what: str, limit_s: float = 90.0) -> None:
    deadline = time.monotonic() + limit_s
    while not find():
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:.0f} s"
        time.sleep(0.2)
