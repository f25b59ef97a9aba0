"""New jobs from old ones: the same again, or with changes."""

from __future__ import annotations

from libs.common.contracts.messages import CloneJob, JobTemplate, Resources
from libs.common.errors import Conflict
from services.scheduler.domain.lifecycles import JOBS
from services.scheduler.domain.model import Job
from services.scheduler.domain.templates import PEOPLE

# What a job says of the one it was made from; a copy of a copy names only the last.
RETRY_OF, CLONE_OF = "retry_of", "clone_of"


def retried(job: Job) -> JobTemplate:
    """The template of a job that has ended, for another job: an ended one stays as it is.

    Raises:
        Conflict: it has not ended, or is a service's own.
    """
    _check_kind(job)
    if job.state not in JOBS.terminal:
        detail = f"The job {job.id} is {job.state}, so there is nothing to try again yet."
        remedy = f"Wait for its end, or stop it; `nabla jobs clone {job.id}` runs another beside it."
        raise Conflict("job_not_ended", detail, remedy)
    return _copied(job, RETRY_OF)


def cloned(job: Job, changes: CloneJob) -> JobTemplate:
    """The template of a job with what is to differ.

    Raises:
        Conflict: it is a service's own.
    """
    _check_kind(job)
    template = _copied(job, CLONE_OF)
    asked = Resources() if changes.machine_type else template.resources
    resources = asked.model_copy(update={name: value for name, value in changes.resources if value})
    said = {
        "name": changes.name,
        "command": changes.command,
        "machine_type": changes.machine_type,
        "priority": changes.priority,
        "timeout_s": changes.timeout_s,
        "max_retries": changes.max_retries,
    }
    update = {name: value for name, value in said.items() if value not in (None, "", ())}
    return template.model_copy(update=update | {"env": {**template.env, **changes.env}, "resources": resources})


def _copied(job: Job, relation: str) -> JobTemplate:
    origin = {name: value for name, value in job.template.origin.items() if name not in {RETRY_OF, CLONE_OF}}
    return job.template.model_copy(update={"origin": origin | {relation: job.id}})


def _check_kind(job: Job) -> None:
    if job.template.kind not in PEOPLE:
        detail = f"The job {job.id} is a {job.template.kind} of a deployment, which makes its jobs itself."
        raise Conflict("job_of_a_service", detail, "See `nabla deployments list`.")
