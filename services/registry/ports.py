"""What the registry needs from others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from libs.common.contracts.messages import Execution, Fileset, Job
from libs.common.errors import Conflict, NablaError


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


class Attempts(Protocol):
    """The executor's attempts."""

    async def of_token(self, token_hash: str) -> Execution:
        """The attempt whose token this is, which has not ended.

        Raises:
            Unauthenticated: there is none.
            Unavailable: the owner does not answer now.
        """


class UnusableKeys(NablaError):
    """The installation's keys cannot be used; the text says why and what to do."""


class BrokenSeal(Conflict):
    """A sealed value that was changed, that is bound to something else, or whose key is not there."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A value under a key of its own, and that key under one of the installation's."""

    ciphertext: bytes = field(repr=False)
    wrapped_key: bytes = field(repr=False)
    key_id: str = ""


class Vault(Protocol):
    """Encryption at rest. `bound_to` is authenticated with the value: elsewhere it does not open."""

    def seal(self, value: bytes, bound_to: bytes) -> Sealed: ...

    def open(self, sealed: Sealed, bound_to: bytes) -> bytes:
        """Raises BrokenSeal."""

    def rewrap(self, sealed: Sealed, bound_to: bytes) -> Sealed:
        """The same value with its key under the newest of the installation's keys. Raises BrokenSeal."""

    def keys(self) -> Sequence[str]:
        """The ids of the installation's keys, the newest last."""
