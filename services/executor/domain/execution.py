"""The life of an execution: one process of an attempt, of which a gang has one for each rank.

| from                          | driven by                                        | to        |
|-------------------------------|--------------------------------------------------|-----------|
| (none)                        | command execution.start                          | accepted  |
| accepted                      | reserve: the cluster holds its resources         | reserved  |
| reserved                      | tell: the node agent has the order               | starting  |
| reserved, starting            | run: the agent saw the command start             | running   |
| reserved, starting, running   | finish: the agent saw the process end            | finishing |
| any but ended                 | end: sealed and reported; refused; stopped; lost | ended     |

`tell` may be noted after `run` or `finish` were reported, and `run` may come after `finish`: messages overtake each
other. Those moves stay where they are. `ended` absorbs everything.
"""

from __future__ import annotations

import re
from typing import Any

from libs.common.clock import to_us
from libs.common.contracts.messages import Execution, Resources
from libs.common.transitions import TransitionTable

ACCEPTED, RESERVED, STARTING, RUNNING, FINISHING, ENDED = STATES = (
    "accepted",
    "reserved",
    "starting",
    "running",
    "finishing",
    "ended",
)
# What was refused would be refused again; what made a start fail may pass.
REASONS = frozenset({"exited", "stopped", "timed_out", "out_of_memory", "fenced", "lost", "refused", "start_failure"})

TABLE = TransitionTable(
    aggregate="execution",
    moves={
        (ACCEPTED, "reserve"): RESERVED,
        (RESERVED, "tell"): STARTING,
        (RUNNING, "tell"): RUNNING,
        (FINISHING, "tell"): FINISHING,
        (RESERVED, "run"): RUNNING,
        (STARTING, "run"): RUNNING,
        (FINISHING, "run"): FINISHING,
        (RESERVED, "finish"): FINISHING,
        (STARTING, "finish"): FINISHING,
        (RUNNING, "finish"): FINISHING,
        **{(state, "end"): ENDED for state in STATES if state != ENDED},
    },
    terminal=frozenset({ENDED}),
)


def execution_id(attempt_id: str, rank: int | None) -> str:
    """That of a gang's rank names the rank; a job of one process (None) goes by its attempt alone.

    An attempt's id has a fixed length, so that no other's can be read out of it.
    """
    return attempt_id if rank is None else f"{attempt_id}r{rank}"


TRIGGER_OF_REPORT = {RUNNING: "run", FINISHING: "finish", ENDED: "end"}


def facts_of(report: Execution) -> dict[str, Any]:
    """The columns that a node agent's report fills; what it does not say is left as it is."""
    said: dict[str, Any] = {
        "node_id": report.node_id,
        "isolation": report.isolation,
        "addresses": dict(report.addresses),
        "origin": dict(report.origin),
        "peak_memory_bytes": report.peak_memory_bytes,
        "started_us": to_us(report.started_at) if report.started_at else None,
    }
    if report.state == ENDED:
        said |= {
            "reason": report.reason if report.reason in REASONS else "lost",
            "detail": report.detail,
            "exit_code": report.exit_code,
            "signal": report.signal,
            "ended_us": to_us(report.ended_at) if report.ended_at else None,
        }
    return {name: value for name, value in said.items() if value not in (None, "", {}, 0) or name == "exit_code"}


def amounts_for(resources: Resources) -> dict[str, float]:
    """What to reserve: at least one CPU, as no wish is not no use; memory and GPUs only where they are wished for."""
    amounts = {"CPU": resources.cpu_count or 1.0}
    if resources.memory_bytes:
        amounts["memory"] = float(resources.memory_bytes)
    if resources.gpu_count:
        # As exact as the scheduler counts: three times 0.33349 fit there, and would not fit here.
        amounts["GPU"] = round(resources.gpu_count, 3)
    return amounts


def short_reason(text: str, limit: int = 500) -> str:
    """One line that fits into a detail field."""
    return re.sub(r"\s+", " ", text).strip()[:limit]
