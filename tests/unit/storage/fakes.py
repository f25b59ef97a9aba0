"""Storage without an object store: what the ports promise, in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime

from libs.common.contracts.messages import Job
from libs.common.errors import Forbidden, Unavailable
from services.storage.domain.filesets import Stored


class FakeObjects:
    """Signer, ObjectStore and BlockStore in one, as the real adapter is. PUTs are done with `upload`."""

    def __init__(self) -> None:
        self.problem = ""
        # Beginnings of keys that the store refuses.
        self.refused: set[str] = set()
        self.kept: dict[tuple[str, str], bytes] = {}
        self.writes = 0

    def put_url(self, endpoint: str, key: str) -> str:
        return f"put://{endpoint}/{key}"

    def get_url(self, endpoint: str, key: str, version: str, name: str) -> str:
        return f"get://{endpoint}/{key}?{version}"

    async def prepare(self) -> None:
        return None

    async def versions(self, prefix: str) -> list[Stored]:
        self._check(prefix)
        return [
            Stored(key, version, len(body), hashlib.md5(body, usedforsecurity=False).hexdigest())
            for (key, version), body in self.kept.items()
            if key.startswith(prefix)
        ]

    async def remove(self, objects: Iterable[Stored]) -> None:
        self._check()
        for item in objects:
            self.kept.pop((item.key, item.version), None)

    async def abort_multiparts(self, before: datetime) -> int:
        return 0

    async def write(self, key: str, body: bytes) -> None:
        self._check(key)
        self.writes += 1
        self.kept[key, ""] = body

    async def read(self, key: str, offset: int, length: int) -> bytes:
        self._check()
        return self.kept[key, ""][offset : offset + length]

    async def find(self, key: str) -> bytes | None:
        self._check()
        return self.kept.get((key, ""))

    def upload(self, url: str, body: bytes) -> None:
        key = url.split("/", 3)[3]
        self.kept[key, f"v{len(self.kept) + 1}"] = body

    def _check(self, key: str = "") -> None:
        if self.problem or any(key.startswith(start) for start in self.refused):
            raise Unavailable("object_store_unavailable", self.problem or "refused")


class FakeFrames:
    """The bus's frames, all settled unless a test says otherwise."""

    def __init__(self) -> None:
        self.newest = 0
        self.settled = 0
        self.silent = False

    async def newest_and_settled(self) -> tuple[int, int]:
        if self.silent:
            raise Unavailable("bus_silent", "the bus does not answer")
        return self.newest, self.settled


class FakeJobs:
    """The scheduler's jobs; those of teams that are named here alone."""

    def __init__(self) -> None:
        self.known: dict[str, Job] = {}
        self.silent = False
        self.asked: list[str] = []
        # Jobs of which the scheduler tells nothing.
        self.refused: set[str] = set()

    async def get(self, job_id: str, team_id: str) -> Job | None:
        if self.silent:
            raise Unavailable("service_silent", "the scheduler does not answer")
        self.asked.append(job_id)
        if job_id in self.refused:
            raise Forbidden("not_allowed", "not for storage")
        found = self.known.get(job_id)
        return found if found and found.team_id == team_id else None
