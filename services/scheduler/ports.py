"""What the scheduler needs from outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from libs.common.contracts.messages import Execution, NodePage, Project
from services.scheduler.domain.machine_types import MachineTypes


class Executor(Protocol):
    """Questions to the executor, for when its events do not come."""

    async def executions(self, team_id: str, attempt_ids: Sequence[str]) -> tuple[Execution, ...]:
        """What it knows of these attempts; those it never heard of are missing from the answer.

        Raises:
            Refusal: it does not answer, or not to us.
        """
        ...

    async def nodes(self) -> NodePage:
        """Its whole inventory.

        Raises:
            Refusal: it does not answer, or not to us.
        """
        ...


class MachineTypeSource(Protocol):
    """The installation's own machine types."""

    def types(self) -> MachineTypes | None:
        """None when it names none, so that those of the nodes there are count.

        Raises:
            Conflict: they cannot be read.
        """
        ...


class Registry(Protocol):
    """Questions to the registry, for when its events do not come."""

    async def project(self, team_id: str, project_id: str) -> Project | None:
        """The project as it is now; None when this team has none of that id: purged, moved away, or never there.

        Raises:
            Refusal: it does not answer, or not to us.
        """
        ...
