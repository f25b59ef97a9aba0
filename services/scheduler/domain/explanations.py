"""Why a job is in its state, and of one that waits, what it waits for: as facts, and in a sentence."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from libs.common.clock import from_us
from libs.common.contracts.messages import Holder, JobExplanation, NodeRoom, Resources
from services.scheduler.domain.cluster import Machine, Room, empty_room
from services.scheduler.domain.machine_types import resources_of
from services.scheduler.domain.model import Case
from services.scheduler.domain.policy import Demand, Policy
from services.scheduler.domain.shapes import Parts, Shape, can_run, offers, parts_of, parts_text, summed

MAX_NODES = 200
_SENTENCES = {
    "submitted": "It was submitted",
    "waiting": "It waits for something that must come first",
    "queued": "It waits",
    "starting": "It has a machine and is being started there",
    "running": "It runs",
    "unreachable": "Contact to it was lost",
    "succeeded": "Its process ended with exit code 0",
    "failed": "It has failed",
    "cancelled": "It was cancelled",
    "timed_out": "It was stopped at its time limit",
}


def explanation(
    case: Case, cause: str, policy: Policy, hostnames: Mapping[str, str], holders: Sequence[Case]
) -> JobExplanation:
    """
    Args:
        cause: of the newest entry of its history.
        hostnames: of the nodes, by id.
        holders: jobs of the asker's own team that hold something.
    """
    job = case.job
    parts = parts_of(job.template)
    known = JobExplanation(
        job_id=job.id,
        state=job.state,
        cause=cause,
        summary=_told(case),
        needs=tuple(resources_of(part) for part in parts),
        priority=job.priority,
        waiting=policy.waiting,
    )
    demand = policy.demand(job.id)
    if job.state != "queued" or demand is None or demand.node_ids:
        return known
    return known.model_copy(update=_of_waiting(case, demand, policy, hostnames, holders))


def _of_waiting(
    case: Case, demand: Demand, policy: Policy, hostnames: Mapping[str, str], holders: Sequence[Case]
) -> dict[str, object]:
    mine = [_holder(other) for other in holders if other.attempt]
    in_use = summed(policy.cluster.held())
    by_mine = summed(part for other in holders for part in parts_of(other.job.template))
    before = policy.before(demand.job_id)
    return {
        "summary": _waits(case, demand, policy, before),
        "advice": _advice(case, demand, policy),
        "before": before,
        "nodes": tuple(_rooms(demand, policy, hostnames))[:MAX_NODES],
        "holders": tuple(mine),
        "held_by_others": resources_of(_at_least_nothing(in_use.minus(by_mine))),
        "not_before": from_us(demand.ready_us) if demand.ready_us else None,
        "give_up_at": from_us(demand.give_up_us) if demand.give_up_us else None,
    }


def _told(case: Case) -> str:
    job = case.job
    return f"{_SENTENCES[job.state]}: {job.detail}" if job.detail else f"{_SENTENCES[job.state]}."


def _waits(case: Case, demand: Demand, policy: Policy, before: int) -> str:
    if demand.ready_us:
        return f"It is tried again soon: {case.job.detail}"
    reason = policy.why_waiting(demand.job_id) or "its turn comes next"
    ahead = f"; {before} {'job waits' if before == 1 else 'jobs wait'} before it" if before else ""
    return f"It needs {parts_text(demand.parts)}. {reason[0].upper()}{reason[1:]}{ahead}."


def _advice(case: Case, demand: Demand, policy: Policy) -> str:
    job = case.job
    if demand.hold:
        return f"`nabla projects restore {job.project_id}` lets it go on, `nabla jobs stop {job.id}` ends it."
    if demand.ready_us:
        return f"Nothing: it goes on by itself. `nabla jobs logs {job.id}` shows how the last try went."
    if not policy.cluster.has_open:
        return (
            "See `nabla nodes list`: `nabla nodes drain NODE --undo` uses one again, `nabla node token` adds one. "
            "The job starts by itself as soon as there is a node."
        )
    if not policy.cluster.could_hold(demand.parts):
        return (
            "Waiting does not help as the nodes are: see `nabla machines` and ask for less, "
            f"as with `nabla jobs clone {job.id} --machine-type TYPE`, or add a larger node with `nabla node token`."
        )
    return "Nothing: it starts by itself when there is room; a higher --priority comes first, and less fits sooner."


def _holder(case: Case) -> Holder:
    assert case.attempt
    return Holder(
        job_id=case.job.id,
        name=case.job.template.name,
        state=case.job.state,
        node_ids=case.attempt.node_ids,
        holds=resources_of(summed(parts_of(case.job.template))),
        started_at=from_us(case.job.started_us) if case.job.started_us else None,
    )


def _rooms(demand: Demand, policy: Policy, hostnames: Mapping[str, str]) -> Collection[NodeRoom]:
    kept = policy.nodes_kept_from(demand)
    return [
        NodeRoom(
            node_id=node,
            hostname=hostnames.get(node, ""),
            total=_shown(machine.total),
            free=_shown(policy.cluster.room_on(node).free),
            obstacle=_obstacle(demand.parts, machine, policy.cluster.room_on(node), kept_back=node in kept),
        )
        for node, machine in policy.cluster.machines.items()
    ]


def _obstacle(parts: Parts, machine: Machine, room: Room, *, kept_back: bool) -> str:
    if machine.closed:
        return machine.closed
    if not any(offers(machine.total, part) for part in parts):
        return "has no such GPU"
    if not any(can_run(machine.total, part) for part in parts):
        return "has no podman"
    if not any(empty_room(machine.total).fit(part) for part in parts):
        return "is too small"
    if not any(room.fit(part) for part in parts):
        return "is in use"
    return "is kept free for a job of several processes" if kept_back else ""


def _shown(shape: Shape) -> Resources:
    return resources_of(_at_least_nothing(shape))


def _at_least_nothing(shape: Shape) -> Shape:
    gpus, cpus, memory = (max(0, amount) for amount in shape.amounts)
    return Shape(gpus, cpus, memory, shape.gpu_model, shape.gpu_memory_bytes)
