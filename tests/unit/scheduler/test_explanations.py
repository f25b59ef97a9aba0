"""Every cause of waiting in a sentence, and what a person can do about it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from services.scheduler.domain.cluster import Machine
from services.scheduler.domain.explanations import explanation
from services.scheduler.domain.policy import Demand, Policy
from services.scheduler.domain.shapes import Shape, shape_of
from tests.unit.scheduler.cases import queued

pytestmark = pytest.mark.unit

GIB = 1 << 30
JOB_ID = queued().job.id
CPU, GPU = shape_of(1, 0, 0), shape_of(1, 0, 1)
START_BY_ITSELF, ASK_FOR_LESS, SEE_NODES = "starts by itself when there is room", "ask for less", "nabla nodes list"


@dataclass
class Waiting:
    """A queue in which the job waits for one reason.

    Args:
        others: (shape, how many ranks, priority) of jobs that were there before.
    """

    says: tuple[str, ...]
    advises: tuple[str, ...]
    shape: Shape = CPU
    ranks: int = 1
    nodes: dict[str, Machine] = field(default_factory=lambda: {"n1": Machine(shape_of(2, 8 * GIB, 0))})
    others: tuple[tuple[Shape, int, int], ...] = ()
    hold: str = ""
    ready_us: int = 0
    detail: str = ""


TWO = {name: Machine(shape_of(1, 8 * GIB, 0)) for name in ("n1", "n2")}
WAITING = {
    "no node": Waiting(("no node is ready",), (SEE_NODES, "nabla node token"), nodes={}),
    "no node, and why": Waiting(("no node is ready: Ray starts",), (SEE_NODES,), nodes={}, detail="Ray starts"),
    "all drained": Waiting(
        ("all nodes are being drained",),
        ("nabla nodes drain NODE --undo",),
        nodes={"n1": Machine(shape_of(2, GIB, 0), closed="is being drained")},
        detail="all nodes are being drained",
    ),
    "held": Waiting(
        ("its project is archived",), ("nabla projects restore", "jobs stop"), hold="its project is archived"
    ),
    "a retry's delay": Waiting(("It is tried again soon",), ("nabla jobs logs",), ready_us=9),
    "too many CPUs": Waiting(("the largest node has 2 CPUs",), (ASK_FOR_LESS, "nabla machines"), shape_of(3, 0, 0)),
    "too much memory": Waiting(("the largest node has 8 GiB",), (ASK_FOR_LESS,), shape_of(1, 9 * GIB, 0)),
    "no GPU at all": Waiting(("the largest node has 0 GPUs",), (ASK_FOR_LESS,), GPU),
    "a GPU that is nowhere": Waiting(
        ("no node that takes work has such a GPU",), (ASK_FOR_LESS,), Shape(1000, 1000, 0, "B900")
    ),
    "all of it on no one node": Waiting(
        ("no node has all of it",),
        (ASK_FOR_LESS,),
        shape_of(4, 8 * GIB, 0),
        nodes={"n1": Machine(shape_of(4, GIB, 0)), "n2": Machine(shape_of(1, 8 * GIB, 0))},
    ),
    "a gang larger than the cluster": Waiting(("all nodes together have not",), (ASK_FOR_LESS,), ranks=3),
    "in use": Waiting(("to become free on one node",), (START_BY_ITSELF,), others=((CPU, 1, 50),) * 2),
    "its turn": Waiting(("1 job waits before it",), (START_BY_ITSELF,), others=((CPU, 1, 50),) * 3),
    "kept free for a gang": Waiting(
        ("kept free for a job of several processes",),
        (START_BY_ITSELF, "--priority"),
        nodes=TWO,
        others=((CPU, 1, 50), (CPU, 2, 50)),
    ),
}


@pytest.mark.parametrize("name", WAITING)
def test_each_cause_of_waiting_is_said_with_what_to_do(name: str) -> None:
    wanted = WAITING[name]
    policy = Policy()
    policy.apply_nodes(wanted.nodes, wanted.detail)
    for number, (shape, ranks, priority) in enumerate(wanted.others):
        policy.apply(Demand(f"other{number}", "t", (shape,) * ranks, number, priority))
        policy.decide(0)
    parts = (wanted.shape,) * wanted.ranks
    policy.apply(Demand(JOB_ID, "t", parts, 99, ready_us=wanted.ready_us, hold=wanted.hold))
    assert JOB_ID not in {placement.job_id for placement in policy.decide(0)}
    told = explanation(queued(), "admitted", policy, {}, ())
    assert all(text.lower() in told.summary.lower() for text in wanted.says), told.summary
    assert all(text in told.advice for text in wanted.advises), told.advice
