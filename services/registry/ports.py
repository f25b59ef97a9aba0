"""What the registry needs from others."""

from __future__ import annotations

from typing import Protocol

from libs.common.contracts.messages import Fileset, Job


class Jobs(Protocol):
    """The scheduler's jobs, for runs whose events did not come."""

    async def get(self, job_id: str, team_id: str) -> Job | None:
        """The job as it is now; None when its owner does not know it.

        Raises:
            Unavailable: the owner does not answer now.
        """


class Filesets(Protocol):
    """Storage's file sets, which models are made of."""

    async def get(self, fileset_id: str, team_id: str) -> Fileset | None:
        """The team's file set; None when its owner does not know it.

        Raises:
            Unavailable: the owner does not answer now.
        """
