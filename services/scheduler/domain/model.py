"""Jobs, attempts and experiments as the scheduler knows them. Times are microseconds since 1970 UTC."""

from __future__ import annotations

from dataclasses import dataclass, field

from libs.common.contracts.messages import Execution, JobTemplate, StartExecution, StopExecution

DEFAULT_PRIORITY = 50
UNHEARD_OF = Execution(revision=-1)


@dataclass(frozen=True, slots=True)
class Member:
    """One process of an attempt, and the newest snapshot of what the executor says of it."""

    rank: int
    node_id: str
    seen: Execution = UNHEARD_OF


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a job. Its number is the only fence: what an older one reports never changes the job.

    Args:
        members: all its processes, by rank: one, or those of a gang.
        decided_by: the rank whose end decided how the attempt ends, while others may still be ending.
        reason: when ended, the reason of the execution that decided how.
        execution_revision: the newest snapshot applied of what the executor says of any rank; -1 before the first.
        forgotten: the executor told of it before and says now that it knows of none: its database was restored.
    """

    id: str
    number: int
    created_us: int
    members: tuple[Member, ...]
    state: str = "created"
    decided_by: int | None = None
    reason: str = ""
    detail: str = ""
    exit_code: int | None = None
    started_us: int | None = None
    ended_us: int | None = None
    isolation: str = ""
    peak_memory_bytes: int = 0
    addresses: dict[str, str] = field(default_factory=dict)
    gpu_indices: tuple[int, ...] = ()
    origin: dict[str, str] = field(default_factory=dict)
    execution_revision: int = -1
    forgotten: bool = False

    @property
    def node_id(self) -> str:
        """Where its first process is."""
        return self.members[0].node_id

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Where its processes are, by rank."""
        return tuple(member.node_id for member in self.members)


@dataclass(frozen=True, slots=True)
class Job:
    """One execution request.

    Args:
        desired_state: running or cancelled; what people want, while `state` is what is.
        ready_us: not to be placed before; a retry waits a little.
        retries_used: tries that the user's own failures have used, out of template.max_retries.
        infra_retries_used: tries that machines have cost.
        preemptions_used: tries that were stopped though nobody wanted the job cancelled.
        traceparent: the trace that the submission began; placements continue it.
    """

    id: str
    team_id: str
    project_id: str
    template: JobTemplate
    created_us: int
    experiment_id: str = ""
    created_by: str = ""
    state: str = "submitted"
    detail: str = ""
    desired_state: str = "running"
    revision: int = 0
    queued_us: int | None = None
    ready_us: int = 0
    started_us: int | None = None
    ended_us: int | None = None
    exit_code: int | None = None
    attempt_count: int = 0
    retries_used: int = 0
    infra_retries_used: int = 0
    preemptions_used: int = 0
    traceparent: str = ""

    @property
    def priority(self) -> int:
        """0 to 100, the higher first."""
        said = self.template.priority
        return DEFAULT_PRIORITY if said is None else said


@dataclass(frozen=True, slots=True)
class Case:
    """A job with its newest attempt, and the commands that leave in the commit that saves it.

    Args:
        cause: in one word, why it came to be as it is, for its history.
        actor: who moved it, where that is not this service.
    """

    job: Job
    attempt: Attempt | None = None
    commands: tuple[StartExecution | StopExecution, ...] = ()
    cause: str = ""
    actor: str = ""


@dataclass(frozen=True, slots=True)
class Experiment:
    """A named template plus its jobs."""

    id: str
    team_id: str
    project_id: str
    name: str
    kind: str
    created_by: str
    created_us: int
