"""Jobs, attempts and executions to start tests from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from libs.common.contracts.messages import Execution, JobTemplate, Resources
from services.scheduler.domain.lifecycles import admit, place
from services.scheduler.domain.model import Case, Job

TEAM = "t" + "0" * 26
PROJECT = "pr" + "0" * 26
NOW = 1_700_000_000_000_000
SECOND = 1_000_000


def template(**fields: Any) -> JobTemplate:
    values = {"command": ("echo hello",), "kind": "command", "resources": Resources(cpu_count=1)} | fields
    return JobTemplate(**values)


def queued(**fields: Any) -> Case:
    job = Job(
        id="js" + "0" * 26, team_id=TEAM, project_id=PROJECT, template=template(**fields), created_us=NOW, revision=1
    )
    return admit(job, NOW, "ada")


def placed(**fields: Any) -> Case:
    return replace(place(queued(**fields).job, "at1", ("node1",), NOW), commands=())


def said(case: Case, state: str, revision: int = 1, **fields: Any) -> Execution:
    """What the executor says of the case's attempt."""
    assert case.attempt
    return Execution(
        attempt_id=case.attempt.id,
        job_id=case.job.id,
        number=case.attempt.number,
        state=state,
        revision=revision,
        **fields,
    )
