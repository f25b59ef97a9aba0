from __future__ import annotations

import math
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.contracts import messages as m
from libs.common.contracts.message import Message
from libs.common.errors import Conflict, Invalid, NotFound, Refusal, TooLarge, Unavailable
from libs.common.ids import new_id
from services.registry.domain import runs as rules
from services.registry.domain.runs import Measured
from services.registry.loops import RunCheck
from tests.unit.registry.harness import Catalogue, attempt_of, job_in

pytestmark = pytest.mark.unit

AT = datetime(2026, 1, 2, tzinfo=UTC)


def points(name: str, values: list[float], first: int = 0) -> tuple[m.Point, ...]:
    return tuple(m.Point(name=name, value=value, step=first + step) for step, value in enumerate(values))


async def log(catalogue: Catalogue, who: m.Principal, **entry: object) -> m.Run:
    return await catalogue.ask(m.LogRun.model_validate(entry), who, m.Run)


async def run_of(catalogue: Catalogue, who: m.Principal, job: m.Job) -> m.Run:
    return await catalogue.ask(m.GetRun(job_id=job.id), who, m.Run)


async def series_of(catalogue: Catalogue, who: m.Principal, job: m.Job, **asked: object) -> dict[str, m.Series]:
    message = m.GetMetrics.model_validate({"job_id": job.id} | asked)
    return {each.name: each for each in (await catalogue.ask(message, who, m.MetricPage)).items}


def event_for(state: str, job: m.Job) -> Message:
    kind = {
        "queued": m.JobQueued,
        "starting": m.JobStarting,
        "running": m.JobRunning,
        "unreachable": m.JobUnreachable,
        "succeeded": m.JobSucceeded,
        "failed": m.JobFailed,
        "cancelled": m.JobCancelled,
        "timed_out": m.JobTimedOut,
    }[state]
    return kind(job=job)


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled", "timed_out"])
async def test_run_follows_its_job(catalogue: Catalogue, member: m.Principal, project: m.Project, end: str) -> None:
    job = job_in(project)
    for revision, state in enumerate(["queued", "starting", "running", "unreachable", "running", end], 1):
        ended_at = AT if state == end else None
        attempt = m.Attempt(number=min(revision - 1, 1))
        now = job.model_copy(update={"state": state, "revision": revision, "ended_at": ended_at, "attempt": attempt})
        await catalogue.tell(event_for(state, now))
        run = await run_of(catalogue, member, job)
        assert (run.state, run.name, run.ended_at) == (state, "train", ended_at)
        assert (run.project_id, run.team_id, run.created_at) == (project.id, project.team_id, AT)


async def test_older_snapshot_of_a_job_changes_nothing(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    job = job_in(project, state="running", revision=5)
    await catalogue.tell(m.JobRunning(job=job))
    await catalogue.tell(m.JobQueued(job=job.model_copy(update={"state": "queued", "revision": 1})))
    assert (await run_of(catalogue, member, job)).state == "running"


async def test_attempt_logs_before_the_event_of_its_job_came(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    job = job_in(project, state="running", revision=3)
    await log(catalogue, attempt_of(job), points=points("loss", [2.0, 1.0]))
    await catalogue.tell(m.JobRunning(job=job))
    run = await run_of(catalogue, member, job)
    assert (run.state, run.name, run.created_at, run.metrics) == ("running", "train", AT, {"loss": 1.0})


async def test_params_tags_and_last_values_are_kept_and_told_once_a_call(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    job = job_in(project)
    await catalogue.tell(m.JobQueued(job=job))
    attempt = attempt_of(job)
    await log(catalogue, attempt, params={"lr": "0.1", "seed": "1"}, tags={"kind": "cnn"})
    answer = await log(
        catalogue, attempt, points=points("loss", [3, 2]) + points("accuracy", [0.5]), params={"lr": "0.2"}
    )
    assert (answer.metrics, answer.params, answer.tags) == ({"loss": 2, "accuracy": 0.5}, {"lr": "0.2"}, {})
    run = await run_of(catalogue, member, job)
    assert run.params == {"lr": "0.2", "seed": "1"}
    assert run.tags == {"kind": "cnn"}
    assert run.metrics == {"accuracy": 0.5, "loss": 2.0}
    told = [body for kind, body, _ in await catalogue.emitted() if kind == "run.logged.v1"]
    assert [body["metrics"] for body in told] == [{}, {"loss": 2, "accuracy": 0.5}]


async def test_same_points_again_change_nothing_and_a_new_value_replaces_the_old(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    job = job_in(project)
    attempt = attempt_of(job)
    for _ in range(3):
        await log(catalogue, attempt, points=points("loss", [3, 2, 1]))
    await log(catalogue, attempt, points=points("loss", [9], first=1))
    found = (await series_of(catalogue, member_of(job), job))["loss"]
    assert [point.value for point in found.points] == [3, 9, 1]
    assert (found.min, found.max, found.last, found.point_count) == (1, 9, 1, 3)
    assert (await run_of(catalogue, member, job)).metrics == {"loss": 1.0}


def member_of(job: m.Job) -> m.Principal:
    return m.Principal(kind="user", id=new_id("user"), team_id=job.team_id, role="viewer")


async def test_of_two_points_at_one_step_in_a_call_the_later_counts(catalogue: Catalogue, project: m.Project) -> None:
    job = job_in(project)
    twice = (m.Point(name="loss", value=1, step=0), m.Point(name="loss", value=2, step=0))
    await log(catalogue, attempt_of(job), points=twice)
    assert (await series_of(catalogue, member_of(job), job))["loss"].last == 2


async def test_points_keep_the_time_they_came_with(catalogue: Catalogue, project: m.Project) -> None:
    job = job_in(project)
    naive = datetime(2026, 1, 2, 3, 4, 5, 6)  # noqa: DTZ001 - a client may leave its zone out
    dated = (m.Point(name="a", value=1, at=AT), m.Point(name="b", value=1, at=naive), m.Point(name="c", value=1))
    await log(catalogue, attempt_of(job), points=dated)
    found = await series_of(catalogue, member_of(job), job)
    assert [found[name].points[0].at for name in "abc"] == [AT, naive.replace(tzinfo=UTC), catalogue.time()]


async def test_older_attempt_is_refused_once_a_newer_one_has_begun(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    job = job_in(project)
    await log(catalogue, attempt_of(job, 1), points=points("loss", [5, 4, 3]))
    newer = job.model_copy(update={"state": "starting", "revision": 7, "attempt": m.Attempt(number=2)})
    await catalogue.tell(m.JobStarting(job=newer))
    with pytest.raises(Conflict) as refusal:
        await log(catalogue, attempt_of(job, 1), points=points("loss", [1], first=3))
    assert (refusal.value.code, refusal.value.facts) == ("attempt_superseded", {"attempt": 2})
    with pytest.raises(Conflict):
        await log(catalogue, member, job_id=job.id, attempt=1, points=points("loss", [1]))
    await log(catalogue, attempt_of(job, 2), points=points("loss", [4.5, 2], first=1))
    found = (await series_of(catalogue, member, job))["loss"]
    assert [(point.step, point.value) for point in found.points] == [(0, 5), (1, 4.5), (2, 2)]
    assert (await run_of(catalogue, member, job)).metrics == {"loss": 2.0}


async def test_attempt_that_claims_a_later_number_still_writes_under_its_own(
    catalogue: Catalogue, project: m.Project
) -> None:
    job = job_in(project)
    await log(catalogue, attempt_of(job, 1), attempt=99, points=points("loss", [1]))
    await log(catalogue, attempt_of(job, 1), points=points("loss", [2], first=1))


async def test_attempt_writes_and_reads_its_own_run_only(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    job, other = job_in(project), job_in(project)
    await catalogue.tell(m.JobQueued(job=job))
    await catalogue.tell(m.JobQueued(job=other))
    attempt = attempt_of(job)
    await log(catalogue, attempt, job_id=job.id, tags={"a": "b"})
    for message, reply in (
        (m.LogRun(job_id=other.id, tags={"a": "b"}), m.Run),
        (m.GetRun(job_id=other.id), m.Run),
        (m.GetMetrics(job_id=other.id), m.MetricPage),
    ):
        with pytest.raises(NotFound):
            await catalogue.ask(message, attempt, reply)


async def test_member_does_not_make_runs_of_jobs_that_are_not_there(catalogue: Catalogue, member: m.Principal) -> None:
    for job_id in (new_id("job"), "", "\0", "' OR 1=1"):
        with pytest.raises(NotFound):
            await log(catalogue, member, job_id=job_id, tags={"a": "b"})


async def test_refused_call_leaves_nothing_behind(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    job = job_in(project)
    attempt = attempt_of(job)
    many = tuple(m.Point(name=f"m{n}", value=n) for n in range(rules.MOST_METRIC_NAMES))
    await log(catalogue, attempt, points=many)
    revision = (await run_of(catalogue, member, job)).revision
    with pytest.raises(TooLarge):
        await log(catalogue, attempt, points=points("one more", [1]), tags={"a": "b"})
    run = await run_of(catalogue, member, job)
    assert (len(run.metrics), run.tags, run.revision) == (1000, {}, revision)


async def test_answer_with_many_long_series_fits_the_bus(catalogue: Catalogue, project: m.Project) -> None:
    job = job_in(project)
    for start in range(0, 1000, 100):
        names = [f"metric-{n}" for n in range(start, start + 100)]
        entries = tuple(m.Point(name=name, value=math.sin(step) / 3, step=step) for name in names for step in range(30))
        await log(catalogue, attempt_of(job), points=entries)
    message = m.GetMetrics(job_id=job.id, max_points=1_000_000)
    page = await catalogue.ask(message, member_of(job), m.MetricPage)
    assert len(page.items) == 1000
    assert all(each.point_count == 30 for each in page.items)
    assert len(page.to_wire()) < 1_000_000


@pytest.mark.parametrize(
    ("entry", "refusal"),
    [
        ({"points": [{"name": "", "value": 1}]}, Invalid),
        ({"points": [{"name": "x" * 251, "value": 1}]}, Invalid),
        ({"points": [{"name": "a\nb", "value": 1}]}, Invalid),
        ({"points": [{"name": "loss", "value": float("nan")}]}, Invalid),
        ({"points": [{"name": "loss", "value": float("-inf")}]}, Invalid),
        ({"points": [{"name": "loss", "value": 1, "step": 2**63}]}, Invalid),
        ({"points": [{"name": "loss", "value": 1, "step": n} for n in range(10_001)]}, TooLarge),
        ({"params": {"": "x"}}, Invalid),
        ({"params": {"x" * 251: "x"}}, Invalid),
        ({"params": {"x": "y" * 1001}}, Invalid),
        ({"tags": {"x": "\0"}}, Invalid),
        ({"params": {str(n): "" for n in range(501)}}, TooLarge),
        ({"tags": {str(n): "" for n in range(201)}}, TooLarge),
    ],
)
def test_entry_that_cannot_be_kept_is_refused(entry: dict[str, object], refusal: type[Exception]) -> None:
    with pytest.raises(refusal):
        rules.check_log(m.LogRun.model_validate(entry))


def test_largest_entry_is_taken() -> None:
    rules.check_log(m.LogRun(points=points("x" * 250, [0.0] * 10_000)))


values = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(values, min_size=1, max_size=400), st.integers(4, 60))
def test_thinned_series_keeps_first_last_and_extremes_in_order(numbers: list[float], most: int) -> None:
    line = [Measured(1, step, value, 0) for step, value in enumerate(numbers)]
    kept = rules.thinned(line, most)
    assert len(kept) <= most
    assert len(kept) == len(line) or len(kept) >= min(4, len(line)) - 3
    steps = [point.step for point in kept]
    assert steps == sorted(set(steps))
    assert (kept[0], kept[-1]) == (line[0], line[-1])
    kept_values = [point.value for point in kept]
    assert (min(kept_values), max(kept_values)) == (min(numbers), max(numbers))
    assert set(kept) <= set(line)


@pytest.mark.parametrize("spike", [-1.0, 1.0])
def test_spike_at_any_step_survives_thinning(spike: float) -> None:
    for position in range(200):
        line = [Measured(1, step, spike if step == position else 0.0, 0) for step in range(200)]
        assert line[position] in rules.thinned(line, 10)


@given(st.integers(5, 2000), st.integers(8, 100))
def test_thinned_series_is_even(count: int, most: int) -> None:
    line = [Measured(1, step, float(step), 0) for step in range(count)]
    steps = [point.step for point in rules.thinned(line, most)]
    widest = max(b - a for a, b in pairwise(steps))
    assert widest <= math.ceil((count - 1) / (most - 4 + 1)) + 1


@given(st.dictionaries(st.tuples(st.integers(1, 4), st.integers(-20, 20)), st.floats(-1, 1), min_size=1, max_size=60))
def test_spliced_line_takes_each_step_from_the_newest_attempt_that_came_there(
    found: dict[tuple[int, int], float],
) -> None:
    stored = [Measured(attempt, step, value, 0) for (attempt, step), value in sorted(found.items())]
    line = rules.spliced(stored)
    steps = [point.step for point in line]
    assert steps == sorted(set(steps))
    newest = max(attempt for attempt, _ in found)
    assert [point for point in line if point.attempt == newest] == [
        point for point in stored if point.attempt == newest
    ]
    assert line[-1] == stored[-1]
    attempts = [point.attempt for point in line]
    assert attempts == sorted(attempts)
    assert min(steps) == min(step for _, step in found)


@given(st.integers(-5, 10**6), st.integers(0, 1000))
def test_whole_answer_stays_within_the_points_that_fit(asked: int, count: int) -> None:
    each = rules.points_each(asked, count)
    assert each >= rules.FEWEST_POINTS
    assert each * count <= rules.MOST_ANSWERED_POINTS


@pytest.mark.parametrize("most", [8, 40])
async def test_a_long_series_shows_the_same_as_a_short_one(
    catalogue: Catalogue, member: m.Principal, project: m.Project, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    job = job_in(project)
    for number, first in ((1, 0), (2, 300), (3, 250)):
        values_of_attempt = [math.sin(number + step / 9) for step in range(400)]
        entries = points("loss", values_of_attempt, first)
        await log(catalogue, attempt_of(job, number=number), points=entries)
    await log(catalogue, attempt_of(job, number=3), points=points("short", [1.0, 2.0]))
    in_python = await series_of(catalogue, member, job, max_points=most)
    monkeypatch.setattr(rules, "LONG_SERIES", 100)
    by_database = await series_of(catalogue, member, job, max_points=most)
    assert by_database["short"] == in_python["short"]
    long, expected = by_database["loss"], in_python["loss"]
    assert long.model_copy(update={"points": ()}) == expected.model_copy(update={"points": ()})
    assert (long.points[0], long.points[-1]) == (expected.points[0], expected.points[-1])
    shown = [point.value for point in long.points]
    assert (min(shown), max(shown), len(shown) <= most) == (expected.min, expected.max, True)
    assert [point.step for point in long.points] == sorted({point.step for point in long.points})
    assert len(shown) > most // 2


@given(st.dictionaries(st.tuples(st.integers(1, 4), st.integers(-20, 20)), st.floats(-1, 1), min_size=1, max_size=60))
def test_the_database_splices_as_python_does(found: dict[tuple[int, int], float]) -> None:
    stored = [Measured(attempt, step, value, 0) for (attempt, step), value in sorted(found.items())]
    by_attempt = {attempt: [step for number, step in found if number == attempt] for attempt, _ in sorted(found)}
    bounds = rules.bounds([rules.Stretch(attempt, len(steps), min(steps)) for attempt, steps in by_attempt.items()])
    assert [point for point in stored if point.step <= bounds[point.attempt]] == rules.spliced(stored)


async def usage(catalogue: Catalogue, job: m.Job, steps: range, attempt: int = 1) -> int:
    node = m.Principal(kind="service", id="executor", team_id=job.team_id)
    entries = tuple(m.Point(name="system/cpu_percent", value=1.0, step=step) for step in steps)
    message = m.RecordUsage(usages=(m.Usage(job_id=job.id, attempt=attempt, points=entries),))
    return (await catalogue.ask(message, node, m.UsageRecorded)).run_count


async def test_usage_is_kept_beside_what_the_job_logs(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    job = job_in(project)
    await log(catalogue, attempt_of(job), points=points("loss", [1.0]))
    before = await run_of(catalogue, member, job)
    assert await usage(catalogue, job, range(5)) == 1
    after = await run_of(catalogue, member, job)
    assert (after.metrics, after.revision) == ({"loss": 1.0, "system/cpu_percent": 1.0}, before.revision)
    assert list(await series_of(catalogue, member, job, prefix="system/")) == ["system/cpu_percent"]
    newest = (await series_of(catalogue, member, job, newest=2))["system/cpu_percent"]
    assert [point.step for point in newest.points] == [3, 4]


async def test_usage_of_unknown_runs_other_teams_and_older_attempts_is_not_kept(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    job = job_in(project)
    assert await usage(catalogue, job, range(5)) == 0
    await log(catalogue, attempt_of(job, number=2), points=points("loss", [1.0]))
    assert await usage(catalogue, job, range(5)) == 0
    assert await usage(catalogue, job.model_copy(update={"team_id": "tm9"}), range(5), attempt=2) == 0
    assert await usage(catalogue, job, range(5), attempt=2) == 1


async def test_only_nodes_say_what_a_job_uses(catalogue: Catalogue, member: m.Principal, project: m.Project) -> None:
    job = job_in(project)
    for asker in (member, attempt_of(job)):
        with pytest.raises(Refusal):
            await catalogue.ask(m.RecordUsage(usages=(m.Usage(job_id=job.id),)), asker, m.UsageRecorded)


async def test_old_usage_is_thinned_and_what_the_job_logged_is_not(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    job = job_in(project)
    await log(catalogue, attempt_of(job), points=points("loss", [1.0] * 600))
    await usage(catalogue, job, range(600))
    await usage(catalogue, job, range(5395, 5401))
    found = await series_of(catalogue, member, job, max_points=1000)
    assert (found["loss"].point_count, found["system/cpu_percent"].point_count) == (600, 66)
    await usage(catalogue, job, range(86_995, 87_001))
    found = await series_of(catalogue, member, job, max_points=1000)
    assert [point.step for point in found["system/cpu_percent"].points][:3] == [0, 60, 120]


class FakeJobs:
    """Jobs as the scheduler would answer them."""

    def __init__(self, *jobs: m.Job) -> None:
        self.jobs = {job.id: job for job in jobs}
        self.asked: list[str] = []
        self.silent = False

    async def get(self, job_id: str, team_id: str) -> m.Job | None:
        self.asked.append(job_id)
        if self.silent:
            raise Unavailable("service_silent", "The scheduler does not answer.")
        job = self.jobs.get(job_id)
        return job if job and job.team_id == team_id else None


async def test_run_whose_job_ended_unheard_is_brought_up_to_date(
    catalogue: Catalogue, member: m.Principal, project: m.Project
) -> None:
    running, gone = job_in(project, state="running", revision=3), job_in(project, state="running", revision=3)
    for job in (running, gone):
        await catalogue.tell(m.JobRunning(job=job))
    ended = running.model_copy(update={"state": "failed", "revision": 4, "ended_at": AT})
    jobs = FakeJobs(ended)
    check = RunCheck(catalogue.runs, jobs, pause_s=1)
    await check.check()
    assert not jobs.asked
    catalogue.time.pass_(seconds=61)
    jobs.silent = True
    with pytest.raises(Unavailable):
        await check.check()
    jobs.silent = False
    await check.check()
    assert (await run_of(catalogue, member, running)).state == "failed"
    assert (await run_of(catalogue, member, gone)).state == "running"
    jobs.asked.clear()
    await check.check()
    assert not jobs.asked
    catalogue.time.pass_(seconds=61)
    await check.check()
    assert jobs.asked == [gone.id]
