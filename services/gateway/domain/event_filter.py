"""Which stored events a client that follows them may see and has asked for."""

from __future__ import annotations

from dataclasses import dataclass

from libs.common.contracts.messages import Principal

# What happens inside of the platform (executions, nodes, tokens) is not part of the API.
PUBLIC = frozenset({"project", "experiment", "job", "fileset", "log", "run", "model", "deployment"})


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Empty fields admit everything.

    Args:
        types: beginnings of event types, such as `job.` or `job.queued`.
    """

    project_id: str = ""
    object_id: str = ""
    types: tuple[str, ...] = ()

    def admits(self, event_type: str, object_id: str, project_id: str) -> bool:
        return (
            event_type.partition(".")[0] in PUBLIC
            and self.object_id in ("", object_id)
            and self.project_id in ("", project_id)
            and (not self.types or event_type.startswith(self.types))
        )


def limited_to(principal: Principal, wish: EventFilter) -> EventFilter:
    """A running job sees only events about itself, whatever it asks for."""
    if principal.kind != "attempt":
        return wish
    return EventFilter(project_id=principal.project_id, object_id=principal.job_id, types=wish.types)


def parse_types(text: str) -> tuple[str, ...]:
    """`job.,model.registered` as a tuple."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
