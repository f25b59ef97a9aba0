"""What to do next for a deployment: a decision from what is known of it, the same whenever it is asked.

Nothing here depends on having seen an event: a deployment whose events all got lost is taken up from its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from services.serving.domain.lifecycles import JOB_OVER

BUILD_TIMEOUT_S = 600.0
# The scheduler ends a build by its timeout; ours is for when it does not.
BUILD_GRACE_S = 60.0
REPLICA_START_TIMEOUT_S = 120.0
# Artifacts are sealed before a job succeeds; storage may be restarting just then.
BENTO_PATIENCE_S = 60.0
# A replica that served this long did not die of its model.
QUICK_DEATH_S = 60.0
MAX_QUICK_DEATHS = 5
LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True, slots=True)
class OrderedJob:
    """What is known of a build or replica job that this service ordered."""

    id: str
    purpose: str
    state: str
    address: str
    detail: str
    ordered_at: datetime
    running_at: datetime | None = None
    ended_at: datetime | None = None

    @property
    def over(self) -> bool:
        return self.state in JOB_OVER


@dataclass(frozen=True, slots=True)
class Situation:
    """A deployment as its rows have it.

    Args:
        job: the build job while building, else the newest replica job, if any.
        target: "host:port" to which Traefik is told to send requests, or empty.
        ready_at: when the present replica became ready; None when it has not.
        served_before: whether any replica of this deployment ever did.
        restart_at: not before this may the next replica be ordered.
        live_jobs: those of its jobs that have not ended.
    """

    state: str
    job: OrderedJob | None
    target: str
    ready_at: datetime | None
    served_before: bool
    deaths: int
    restart_at: datetime
    live_jobs: tuple[str, ...]
    now: datetime


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do. `detail` tells people what for; None leaves what was said before."""

    detail: str | None = None


@dataclass(frozen=True, slots=True)
class CollectBento:
    job: OrderedJob


@dataclass(frozen=True, slots=True)
class OrderReplica:
    pass


@dataclass(frozen=True, slots=True)
class CheckHealth:
    job: OrderedJob


@dataclass(frozen=True, slots=True)
class Restart:
    """Away from the present replica. With `keep_job` it is the same job, which the scheduler starts elsewhere."""

    reason: str
    deaths: int
    pause_s: float
    keep_job: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Failed for good. The last lines of `log_of`, a job, go into the detail."""

    reason: str
    log_of: str = ""


@dataclass(frozen=True, slots=True)
class Clear:
    """Routes out of Traefik, then jobs halted, and when all have ended, done."""


Step = Wait | CollectBento | OrderReplica | CheckHealth | Restart | GiveUp | Clear


def next_step(situation: Situation) -> Step:
    match situation.state:
        case "building":
            return _while_building(situation)
        case "starting":
            return _while_starting(situation)
        case "ready":
            return _while_ready(situation)
        case "deleting":
            return Clear()
        case "failed" if situation.target or situation.live_jobs:
            return Clear()
        case _:
            return Wait()


def _while_building(at: Situation) -> Step:
    job = at.job
    if job is None:
        return GiveUp("The build was never ordered.")
    if job.state == "succeeded":
        return CollectBento(job)
    if job.over:
        return GiveUp(f"The model could not be built into a bento: {_ending(job)}", log_of=job.id)
    if _passed_s(job.running_at, at.now) > BUILD_TIMEOUT_S + BUILD_GRACE_S:
        return GiveUp(f"The build did not end within {BUILD_TIMEOUT_S:.0f} s.", log_of=job.id)
    return Wait(_waiting_for("build", job))


def _while_starting(at: Situation) -> Step:
    job = at.job
    if job is None:
        return OrderReplica() if at.now >= at.restart_at else Wait()
    if job.over:
        return after_death(at, f"The replica ended: {_ending(job)}", job)
    waited_s = _passed_s(job.running_at, at.now)
    if job.state == "running" and job.address and waited_s <= REPLICA_START_TIMEOUT_S:
        return CheckHealth(job)
    if job.state == "running" and waited_s > REPLICA_START_TIMEOUT_S:
        return after_timeout(at, job)
    return Wait(_waiting_for("replica", job))


def _while_ready(at: Situation) -> Step:
    job = at.job
    if job is None:
        return Restart("The replica's job is not known any more.", at.deaths, 0.0)
    if job.over:
        return after_death(at, f"The replica ended: {_ending(job)}", job)
    if job.state in ("queued", "starting") or (job.address and job.address != at.target):
        return Restart(job.detail or "The replica is started elsewhere.", at.deaths, 0.0, keep_job=True)
    return Wait("")


def after_death(at: Situation, reason: str, job: OrderedJob) -> Restart | GiveUp:
    """Another replica after a pause that doubles, unless this was the fifth in a row that soon died."""
    served_s = (job.ended_at or at.now) - at.ready_at if at.ready_at else timedelta()
    deaths = at.deaths + 1 if served_s < timedelta(seconds=QUICK_DEATH_S) else 1
    if deaths >= MAX_QUICK_DEATHS:
        return GiveUp(f"{reason}; it was started {deaths} times and never stayed", log_of=job.id)
    return Restart(f"{reason}; it is started again", deaths, min(LONGEST_PAUSE_S, 2.0 ** (deaths - 1)))


def after_timeout(at: Situation, job: OrderedJob) -> Restart | GiveUp:
    """A first replica that runs and never answers is the model's fault; a later one may be the machine's."""
    reason = f"The replica runs, but did not answer within {REPLICA_START_TIMEOUT_S:.0f} s"
    if not at.served_before:
        return GiveUp(f"{reason}.", log_of=job.id)
    return after_death(at, reason, job)


def _ending(job: OrderedJob) -> str:
    return (job.detail or f"its job is {job.state}").rstrip(".")


def _waiting_for(what: str, job: OrderedJob) -> str:
    if job.state in ("running", "unreachable"):
        return f"The {what} runs." if not job.detail else f"The {what} runs: {job.detail}"
    return f"The {what} waits to start." if not job.detail else f"The {what} waits: {job.detail}"


def _passed_s(since: datetime | None, now: datetime) -> float:
    return (now - since).total_seconds() if since else 0.0
