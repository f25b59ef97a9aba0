"""Between rows and the domain: what is read together, and how each thing is held in columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

from sqlalchemy import Row, select

from libs.common.contracts.messages import Execution, JobTemplate
from libs.common.telemetry import current_traceparent
from services.scheduler.domain.model import Attempt, Case, Job, Member
from services.scheduler.domain.policy import Demand
from services.scheduler.domain.shapes import Parts, Shape, parts_of
from services.scheduler.tables import ATTEMPTS, JOBS, PROJECTS

_JOB_FIELDS = tuple(item.name for item in fields(Job))
# Members are held in columns of another form: where they are, and what was heard of each.
_ATTEMPT_FIELDS = tuple(item.name for item in fields(Attempt) if item.name != "members")
_MEMBER_FIELDS = ("node_ids", "seen")
_NEWEST = "newest_"
# In these nothing may run.
CLOSED = ("archived", "deleted")
CASES = select(
    *(JOBS.c[name] for name in _JOB_FIELDS),
    *(ATTEMPTS.c[name].label(_NEWEST + name) for name in (*_ATTEMPT_FIELDS, *_MEMBER_FIELDS)),
).outerjoin_from(JOBS, ATTEMPTS, JOBS.c.attempt_id == ATTEMPTS.c.id)
PLACES = select(
    JOBS.c.id.label("job_id"), JOBS.c.state, JOBS.c.detail, ATTEMPTS.c.node_ids, ATTEMPTS.c.forgotten
).join_from(JOBS, ATTEMPTS, JOBS.c.attempt_id == ATTEMPTS.c.id)
DEMANDS = (
    select(
        JOBS.c.id,
        JOBS.c.team_id,
        JOBS.c.kind,
        JOBS.c.parts,
        JOBS.c.priority,
        JOBS.c.state,
        JOBS.c.created_us,
        JOBS.c.queued_us,
        JOBS.c.ready_us,
        JOBS.c.max_wait_us,
        ATTEMPTS.c.node_ids,
        ATTEMPTS.c.gpu_indices,
        ATTEMPTS.c.seen,
        ATTEMPTS.c.ended_us.label("attempt_ended_us"),
        PROJECTS.c.state.label("project_state"),
    )
    .outerjoin_from(JOBS, ATTEMPTS, JOBS.c.attempt_id == ATTEMPTS.c.id)
    .outerjoin(PROJECTS, JOBS.c.project_id == PROJECTS.c.id)
)


def identity_columns(job: Job) -> dict[str, Any]:
    """The columns that never change."""
    template = job.template
    return {
        "team_id": job.team_id,
        "project_id": job.project_id,
        "experiment_id": job.experiment_id,
        "kind": template.kind,
        "template": template.model_dump_json(exclude_defaults=True),
        "parts": parts_text(parts_of(template)),
        "priority": job.priority,
        "max_wait_us": int(template.max_wait_s * 1_000_000),
        "created_by": job.created_by,
        "created_us": job.created_us,
        "traceparent": job.traceparent,
    }


def changing_columns(job: Job) -> dict[str, Any]:
    return {
        "state": job.state,
        "detail": job.detail,
        "desired_state": job.desired_state,
        "queued_us": job.queued_us,
        "ready_us": job.ready_us,
        "started_us": job.started_us,
        "ended_us": job.ended_us,
        "exit_code": job.exit_code,
        "attempt_count": job.attempt_count,
        "retries_used": job.retries_used,
        "infra_retries_used": job.infra_retries_used,
        "preemptions_used": job.preemptions_used,
    }


def attempt_columns(attempt: Attempt) -> dict[str, Any]:
    plain = {name: getattr(attempt, name) for name in _ATTEMPT_FIELDS} | {"node_id": attempt.node_id}
    return plain | {
        "node_ids": json.dumps(attempt.node_ids),
        "seen": _seen_text(attempt.members),
        "gpu_indices": json.dumps(attempt.gpu_indices),
        "addresses": json.dumps(attempt.addresses),
        "origin": json.dumps(attempt.origin),
    }


def _seen_text(members: Sequence[Member]) -> str:
    """Nothing for one process alone: the attempt's own columns say what is known of it."""
    if len(members) == 1:
        return ""
    return json.dumps([member.seen.model_dump(mode="json", exclude_defaults=True) for member in members])


def _members(row: Row[Any], prefix: str) -> tuple[Member, ...]:
    node_ids = json.loads(row._mapping[prefix + "node_ids"])
    text = row._mapping[prefix + "seen"]
    if text:
        seen = [Execution.model_validate(each) for each in json.loads(text)]
    else:
        state = "" if row._mapping[prefix + "ended_us"] is None else "ended"
        seen = [Execution(state=state, revision=row._mapping[prefix + "execution_revision"])]
    return tuple(Member(rank, *each) for rank, each in enumerate(zip(node_ids, seen, strict=True)))


def step_of(case: Case) -> tuple[str, ...]:
    """What of a case is an entry of its history when it changes."""
    attempt = (case.attempt.id, case.attempt.state) if case.attempt else ()
    return (case.job.state, case.job.desired_state, *attempt)


def timeline_entry(job: Job, now_us: int, actor: str, cause: str) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "revision": job.revision,
        "at_us": now_us,
        "state": job.state,
        "detail": job.detail,
        "attempt": job.attempt_count,
        "actor": actor,
        "cause": cause,
        "trace_id": current_traceparent()[3:35],
    }


def read_case(row: Row[Any]) -> Case:
    values = {name: row._mapping[name] for name in _JOB_FIELDS}
    values["template"] = JobTemplate.model_validate_json(row.template)
    return Case(Job(**values), read_attempt(row, _NEWEST) if row._mapping[_NEWEST + "id"] else None)


def read_attempt(row: Row[Any], prefix: str) -> Attempt:
    values = {name: row._mapping[prefix + name] for name in _ATTEMPT_FIELDS}
    values["addresses"] = json.loads(values["addresses"])
    values["origin"] = json.loads(values["origin"])
    values["gpu_indices"] = tuple(json.loads(values["gpu_indices"]))
    return Attempt(**values, members=_members(row, prefix))


def parts_text(parts: Parts) -> str:
    """As a column holds them: [[how many ranks in a row, *what each of them asks for], ...]."""
    return json.dumps([[len(list(run)), *shape] for shape, run in groupby(parts)])


def read_parts(text: str) -> Parts:
    return tuple(Shape(*shape) for count, *shape in json.loads(text) for _ in range(count))


def read_demand(row: Row[Any], now_us: int) -> Demand | None:
    fixed = {"job_id": row.id, "team_id": row.team_id, "parts": read_parts(row.parts), "order": row.created_us}
    fixed |= {"priority": row.priority, "lasting": row.kind == "replica"}
    node_ids = tuple(json.loads(row.node_ids)) if row.node_ids else ()
    if row.state == "queued":
        since_us = max(row.queued_us or row.created_us, row.ready_us)
        return Demand(
            **fixed,
            ready_us=row.ready_us if row.ready_us > now_us else 0,
            give_up_us=since_us + row.max_wait_us if row.max_wait_us else 0,
            hold=f"its project is {row.project_state}" if row.project_state in CLOSED else "",
            # A gang begins again where its peers are warm; a single job had better go where it has not failed.
            preferred=node_ids if len(node_ids) > 1 else (),
        )
    if node_ids and row.attempt_ended_us is None:
        return Demand(**fixed, node_ids=node_ids, gpu_indices=_gpus_by_rank(row))
    return None


def _gpus_by_rank(row: Row[Any]) -> tuple[tuple[int, ...], ...]:
    if not row.seen:
        return (tuple(json.loads(row.gpu_indices)),)
    return tuple(tuple(each.get("gpu_indices", ())) for each in json.loads(row.seen))
