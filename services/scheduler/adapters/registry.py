"""The registry, asked over the bus."""

from __future__ import annotations

from libs.common.bus import Bus
from libs.common.contracts.messages import GetProject, Principal, Project
from libs.common.errors import NotFound


class BusRegistry:
    """Answers `ports.Registry` by queries."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def project(self, team_id: str, project_id: str) -> Project | None:
        principal = Principal(kind="service", id="scheduler", team_id=team_id)
        try:
            return await self._bus.ask(GetProject(project_id=project_id), Project, principal)
        except NotFound:
            return None
