"""File sets, asked of storage over the bus."""

from __future__ import annotations

from libs.common.bus import Bus
from libs.common.contracts.messages import Fileset, GetFileset, Principal
from libs.common.errors import NotFound


class BusFilesets:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def get(self, fileset_id: str, team_id: str) -> Fileset | None:
        principal = Principal(kind="service", id=self._bus.service, team_id=team_id)
        try:
            return await self._bus.ask(GetFileset(fileset_id=fileset_id), Fileset, principal)
        except NotFound:
            return None
