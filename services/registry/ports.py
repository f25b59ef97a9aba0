"""What the registry needs from others."""

from __future__ import annotations

from typing import Protocol

from libs.common.contracts.messages import Job


class Jobs(Protocol):
    """The scheduler's jobs, for runs whose events did not come."""

    async def get(self, job_id: str, team_id: str) -> Job | None:
        """The job as it is now; None when its owner does not know it.

        Raises:
            Unavailable: the owner does not answer now.
        """
