"""Jobs, asked of the scheduler over the bus."""

from __future__ import annotations

from libs.common.bus import Bus
from libs.common.contracts.messages import GetJob, Job, JobDetail, Principal
from libs.common.errors import NotFound


class BusJobs:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def get(self, job_id: str, team_id: str) -> Job | None:
        principal = Principal(kind="service", id=self._bus.service, team_id=team_id)
        try:
            return (await self._bus.ask(GetJob(job_id=job_id), JobDetail, principal)).job
        except NotFound:
            return None
