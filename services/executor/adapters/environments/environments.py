"""Where `python` in a job comes from: the platform's small environment, one of this machine, or a built one.

A built one is named by the hash of what went into it: the packages in their normal form, the exact Python, the
machine, and the team, as building may run a package's own code.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import posixpath
import re
import stat
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from libs.common.contracts.messages import Environment
from services.executor.adapters.environments.building import RECORD, BuildOrder, python_of_record, size_of, write_new
from services.executor.adapters.environments.interpreters import Interpreter, Interpreters, NoSuchPython
from services.executor.adapters.environments.toolbox import Tell, ToolFailed, ToolStopped
from services.executor.adapters.runtimes.unpacking import BadArchive, inner_path
from services.executor.adapters.workspaces.transfer import remove_tree
from services.executor.domain.beginnings import NotStarted, sounds_passing
from services.executor.domain.requirements import (
    MAX_TEXT_BYTES,
    BadRequirements,
    Packages,
    packages_of,
    python_wanted,
    split_extras,
)

CACHE_BYTES = 20_000_000_000
# In a built environment when all of it is there, with its size.
COMPLETE = ".complete"
GONE = ".gone-"

log = logging.getLogger(__name__)


class EnvironmentRefused(NotStarted):
    """The job cannot have this environment; the text says why, for the user to read."""


class Builder(Protocol):
    async def build(self, order: BuildOrder, tell: Tell) -> None:
        """Fills the prefix; raises ToolFailed or ToolStopped."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An environment to bind read-only at its own path, and how the log names it.

    `record` is the file that lists exactly what is in a built one.
    """

    prefix: str
    name: str
    record: Path | None = None


@dataclass(frozen=True, slots=True)
class Asker:
    """For whom an environment is made: the team, its job's workspace, and who hears how the building goes on."""

    team_id: str
    workspace: Path
    tell: Tell


class Environments:
    """The environments of one node.

    Args:
        default: the prefix of the platform's small environment.
        cache: where built ones are kept; each at a path of its own, as environments cannot be moved.
        hidden: folders of the platform that no job may be shown, whatever it calls its environment.
        builder: makes those that are not there yet.
        cache_bytes: beyond it the longest unused built ones are deleted, but for those in use.
        in_use: prefixes that living attempts have on record.
    """

    def __init__(
        self,
        default: Path,
        cache: Path,
        hidden: tuple[Path, ...],
        builder: Builder,
        *,
        cache_bytes: int = CACHE_BYTES,
        in_use: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._default = default
        self._cache = cache
        self._hidden = tuple(path.resolve() for path in hidden)
        self._builder = builder
        self._interpreters = Interpreters(default / "bin" / "python")
        self._cache_bytes = cache_bytes
        self._in_use = in_use
        self._building: dict[str, asyncio.Lock] = {}
        self._held: Counter[str] = Counter()
        self._clearing = asyncio.Lock()

    @asynccontextmanager
    async def prepared(self, wanted: Environment, asker: Asker) -> AsyncIterator[Prepared]:
        """An environment that nobody deletes within the block; after it, whoever uses it must be among `in_use`.

        Raises:
            EnvironmentRefused.
        """
        found = await self._prepare(wanted, asker)
        try:
            if found.record:
                await self._make_room()
            yield found
        finally:
            if found.record:
                self._held[found.prefix] -= 1

    async def _prepare(self, wanted: Environment, asker: Asker) -> Prepared:
        match wanted.kind or "default":
            case "default" if not wanted.python:
                return self._prepare_default()
            case "venv":
                return self._prepare_present(Path(wanted.path))
            case "default" | "requirements" | "workspace":
                return await self._prepare_built(wanted, asker)
            case other:
                raise EnvironmentRefused(f"{other!r} is not one of default, venv, requirements, workspace")

    def _prepare_default(self) -> Prepared:
        if not _python(self._default):
            raise EnvironmentRefused(f"the default environment is not installed on this node ({self._default})")
        return Prepared(str(self._default), f"default ({_version(self._default)})")

    def _prepare_present(self, path: Path) -> Prepared:
        resolved = path.resolve()
        if not path.is_absolute() or ".." in path.parts or not _python(path):
            raise EnvironmentRefused(f"{path} is not a Python environment on this node")
        if not (path / "pyvenv.cfg").is_file() and not (path / "conda-meta").is_dir():
            raise EnvironmentRefused(f"{path} is neither a virtualenv nor a conda environment")
        for hidden in self._hidden:
            if hidden.is_relative_to(resolved) or resolved.is_relative_to(hidden):
                raise EnvironmentRefused(f"{path} holds files of the platform")
        return Prepared(str(resolved), f"{path} ({_version(path)})")

    async def _prepare_built(self, wanted: Environment, asker: Asker) -> Prepared:
        try:
            python, packages = await self._understand(wanted, asker.workspace)
        except (BadRequirements, NoSuchPython) as error:
            raise EnvironmentRefused(str(error)) from error
        prefix = self._cache / key_of(asker.team_id, python, packages)
        lock = self._building.setdefault(prefix.name, asyncio.Lock())
        if lock.locked() and not (prefix / COMPLETE).exists():
            asker.tell("waiting for the same environment, which another job of the team builds")
        async with lock:
            if not (prefix / COMPLETE).exists():
                await self._build(BuildOrder(prefix, packages, python, asker.team_id), asker.tell)
            os.utime(prefix / COMPLETE)  # the longest unused go when room is needed
            self._held[str(prefix)] += 1
        count = f"{len(packages.lines)} requirements" if packages.lines else "no requirements"
        return Prepared(str(prefix), f"{count} (Python {python.version})", prefix / RECORD)

    async def _understand(self, wanted: Environment, workspace: Path) -> tuple[Interpreter, Packages]:
        """What is to be installed, and with which Python."""
        if wanted.kind == "workspace":
            path = wanted.path
            text = await asyncio.to_thread(_read_inside, workspace, split_extras(path)[0])
        else:
            path, text = wanted.path or "requirements.txt", wanted.requirements
        version = wanted.python or python_of_record(text)
        if not text.strip() and not version:
            raise BadRequirements("the list of requirements is empty")
        python = await self._interpreters.choose(version, python_wanted(split_extras(path)[0], text))

        def read(other: str) -> str:
            if wanted.kind != "workspace":
                raise BadRequirements(f"{path} includes {other}, and only files of the workspace can be included")
            return _read_inside(workspace, other)

        return python, await asyncio.to_thread(packages_of, path, text, python.markers, read)

    async def _build(self, order: BuildOrder, tell: Tell) -> None:
        try:
            await self._builder.build(order, tell)
        except (ToolFailed, ToolStopped) as error:
            detail = f"the requirements cannot be installed:\n{error}"
            raise EnvironmentRefused(detail, may_pass=sounds_passing(str(error))) from error
        size_bytes = await asyncio.to_thread(size_of, order.prefix)
        await asyncio.to_thread(write_new, order.prefix / COMPLETE, str(size_bytes))

    async def _make_room(self) -> None:
        """A failure costs room and no job. Chosen without a pause, so nobody takes one up meanwhile."""
        async with self._clearing:
            try:
                for gone in self._put_away():
                    await asyncio.to_thread(remove_tree, gone)
            except OSError:
                log.exception("built environments cannot be deleted")

    def _put_away(self) -> list[Path]:
        """Renames what is to be deleted, with what an earlier agent left half built or half deleted."""
        built, broken = [], []
        for path in self._cache.iterdir():
            lock = self._building.get(path.name)
            try:
                status, size_bytes = (path / COMPLETE).stat(), int((path / COMPLETE).read_text())
            except (OSError, ValueError):
                if not (lock and lock.locked()):
                    broken.append(path)
            else:
                built.append((status.st_mtime_ns, size_bytes, path))
        total = sum(size_bytes for _, size_bytes, _ in built)
        used = self._used() if total > self._cache_bytes else set()
        for _, size_bytes, path in sorted(built):
            if total > self._cache_bytes and str(path) not in used:
                broken.append(path)
                total -= size_bytes
        return [path.rename(path.with_name(f"{GONE}{uuid.uuid4().hex}")) for path in broken]

    def _used(self) -> set[str]:
        asked_for = {str(self._cache / key) for key, lock in self._building.items() if lock.locked()}
        return {*self._in_use(), *(prefix for prefix, count in self._held.items() if count), *asked_for}


def key_of(team_id: str, python: Interpreter, packages: Packages) -> str:
    """The name of a built environment: the same inputs give the same."""
    machine = python.markers.get("platform_machine", "")
    inputs = [team_id, python.version, python.base, machine, packages.lines, packages.constraints]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]


def _read_inside(workspace: Path, path: str) -> str:
    """A file of the workspace; a link in it may not lead out of it."""
    try:
        found = workspace / inner_path(posixpath.normpath(path))
        real = found.resolve(strict=True)
        status = real.stat()
    except (BadArchive, OSError, RuntimeError):
        raise BadRequirements(f"the workspace has no {path[:200]}; was it left out by an ignore file?") from None
    if not real.is_relative_to(workspace.resolve()) or not stat.S_ISREG(status.st_mode):
        raise BadRequirements(f"{path[:200]} is not a file of the workspace")
    if status.st_size > MAX_TEXT_BYTES:
        raise BadRequirements(f"{path[:200]} has {status.st_size} bytes; {MAX_TEXT_BYTES} is the most")
    return real.read_text(encoding="utf-8-sig", errors="replace")


def _python(prefix: Path) -> bool:
    return os.access(prefix / "bin" / "python", os.X_OK)


def _version(prefix: Path) -> str:
    """`Python 3.11.7`, from what the environment says of itself: starting it would cost each job milliseconds."""
    try:
        text = (prefix / "pyvenv.cfg").read_text()
    except OSError:
        text = ""
    found = re.search(r"^version(?:_info)?\s*=\s*([0-9.]+)", text, re.MULTILINE)
    if found:
        return f"Python {found[1].rstrip('.')}"
    libraries = sorted((prefix / "lib").glob("python3.*"))
    return f"Python {libraries[-1].name.removeprefix('python')}" if libraries else "Python"
