"""What storage asks of the outside world."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Protocol

from libs.common.contracts.messages import Job
from services.storage.domain.filesets import Stored


class Signer(Protocol):
    """Makes URLs without asking anybody: nothing here touches the network."""

    def put_url(self, endpoint: str, key: str) -> str:
        """A URL that takes a PUT of this key for some minutes, signed for the host `endpoint`.

        Raises:
            Invalid: `endpoint` is not "host" or "host:port".
            Unavailable: there are no keys to sign with.
        """

    def get_url(self, endpoint: str, key: str, version: str, name: str) -> str:
        """A URL that GETs one version of this key as a download called `name`."""


class ObjectStore(Protocol):
    """Objects by key. Every method raises Unavailable while the store does not answer."""

    @property
    def problem(self) -> str:
        """Why the store cannot be used right now, for people; empty when it can."""

    async def prepare(self) -> None:
        """Makes the bucket, with versioning, unless it is there; sets `problem`."""

    async def versions(self, prefix: str) -> list[Stored]:
        """Every version of every object below the prefix."""

    async def remove(self, objects: Iterable[Stored]) -> None:
        """Removes these versions; those that are gone already are no error."""

    async def abort_multiparts(self, before: datetime) -> int:
        """Gives up unfinished multipart uploads begun before then and returns how many."""


class BlockStore(Protocol):
    """Log blocks, written and read by this service alone. Raises Unavailable while the store does not answer."""

    async def write(self, key: str, body: bytes) -> None: ...

    async def read(self, key: str, offset: int, length: int) -> bytes: ...

    async def find(self, key: str) -> bytes | None:
        """The whole object, or None when the store answers that it does not have it."""


class Frames(Protocol):
    """The frames that the bus holds for us. Raises Unavailable while it does not answer."""

    async def newest_and_settled(self) -> tuple[int, int]:
        """The number of the newest frame, and the one up to which all are settled."""


class Jobs(Protocol):
    """The scheduler's jobs, for logs whose job has ended without our hearing of it."""

    async def get(self, job_id: str, team_id: str) -> Job | None:
        """The job as it is now; None when its owner does not know it.

        Raises:
            Unavailable: the owner does not answer now.
        """
