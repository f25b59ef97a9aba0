"""The places besides file sets that a workspace comes from, behind one door: find the version, then fetch it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from libs.common.contracts.messages import Source
from services.executor.adapters.environments.toolbox import Tell
from services.executor.adapters.workspaces.git_source import GitSource
from services.executor.adapters.workspaces.s3_source import FoundObject, S3Source
from services.executor.domain.sources import BadSource


@dataclass(frozen=True, slots=True)
class Found:
    """One version of a source. The same key is the same content, for the same credentials."""

    version: str
    key: str
    s3: FoundObject | None = None


class Sources(Protocol):
    async def find(self, source: Source) -> Found:
        """What there is now. Raises BadSource."""

    async def fetch(self, source: Source, found: Found, target: Path, tell: Tell) -> None:
        """Writes an archive to `target`, which is not there yet. Raises BadSource, OSError."""


class GitAndS3:
    """Both kinds."""

    def __init__(self, git: GitSource, s3: S3Source) -> None:
        self._git = git
        self._s3 = s3

    async def find(self, source: Source) -> Found:
        match source.kind:
            case "git":
                commit = await self._git.find_commit(source)
                return Found(commit, key_of(source, commit))
            case "s3":
                found = await asyncio.to_thread(self._s3.find, source)
                return Found(found.etag, key_of(source, found.etag), found)
            case other:
                raise BadSource(f"{other!r} is not one of git, s3")

    async def fetch(self, source: Source, found: Found, target: Path, tell: Tell) -> None:
        if found.s3:
            await asyncio.to_thread(self._s3.fetch, source, found.s3, target)
        else:
            await self._git.fetch(source, found.version, target, tell)


def key_of(source: Source, version: str) -> str:
    """Not from the ref: two branches at one commit are one archive."""
    secrets = hashlib.sha256(json.dumps([source.username, source.password]).encode()).hexdigest()
    inputs = [source.kind, source.url, source.endpoint, version, secrets]
    return f"{source.kind}-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:40]}"
