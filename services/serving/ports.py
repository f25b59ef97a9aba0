"""What serving needs of the world outside its database."""

from __future__ import annotations

from typing import Protocol

from libs.common.contracts.messages import Job
from services.serving.domain.front import Backend, Config, Pass


class Peers(Protocol):
    """Other services, asked on behalf of a team. Each raises Unavailable when its owner is silent."""

    async def job(self, job_id: str, team_id: str) -> Job | None:
        """The scheduler's present snapshot, or None when it knows no such job."""

    async def bento_of(self, build_job_id: str, team_id: str) -> str:
        """The file set with the bento that the build left, or empty when there is none."""

    async def last_lines(self, job_id: str, team_id: str, count: int) -> tuple[list[str], bool]:
        """The end of a job's log, and whether the log is whole."""


class Health(Protocol):
    async def ready(self, backend: Backend, shown: Pass | None) -> bool:
        """Whether the replica there takes requests.

        Args:
            shown: what opens other machines, when there is any.
        """


class Passes(Protocol):
    async def front_door(self) -> Pass:
        """What the front door shows to nodes; the same until the installation's key changes. Raises Unavailable."""


class Proxy(Protocol):
    async def publish(self, config: Config) -> None:
        """Returns when the proxy routes by `config`, all of it.

        Raises:
            Unavailable: written, but not seen live in time; saying why.
        """


class Vault(Protocol):
    """Keeps endpoint tokens unreadable in the database, its backups and its dumps."""

    def seal(self, secret: str, owner_id: str) -> bytes: ...

    def open(self, sealed: bytes, owner_id: str) -> str: ...
