"""Storage, asked over the bus."""

from __future__ import annotations

from libs.common.bus import Bus
from libs.common.contracts.messages import GetLog, LogPage, Principal

# Beyond every line: the answer has none.
PAST_THE_END = 2**62


class BusLogs:
    """Answers `ports.Logs` by queries."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def is_sealed(self, team_id: str, job_id: str) -> bool:
        principal = Principal(kind="service", id="executor", team_id=team_id)
        return (await self._bus.ask(GetLog(job_id=job_id, after=PAST_THE_END), LogPage, principal)).sealed
