"""Where `python` in a job comes from: the platform's small environment, one of this machine, or a built one."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from libs.common.contracts.messages import Environment
from libs.common.errors import NablaError
from services.executor.adapters.transfer import remove_tree

BUILD_LIMIT_S = 1800.0
LAST_LINES = 10
CACHE_BYTES = 20_000_000_000
# In a built environment when all of it is there, with its size.
COMPLETE = ".complete"
GONE = ".gone-"
# The installer reads its index from the platform's own settings, never from the job's text.
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\s*(\[[^\]]*\])?\s*([=<>!~;\\].*)?")
_HASH = re.compile(r"--hash=[a-z0-9]+:[0-9a-fA-F]+\s*\\?")


log = logging.getLogger(__name__)


class EnvironmentRefused(NablaError):
    """The job cannot have this environment; the text says why, for the user to read."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An environment to bind read-only at its own path, and how the log names it."""

    prefix: str
    name: str
    is_held: bool = False


class Environments:
    """The environments of one node.

    Args:
        default: the prefix of the platform's small environment.
        cache: where built ones are kept; each at a path of its own, as environments cannot be moved.
        hidden: folders of the platform that no job may be shown, whatever it calls its environment.
        cache_bytes: beyond it the longest unused built ones are deleted, but for those in use.
        in_use: prefixes that living attempts have on record.
    """

    def __init__(
        self,
        default: Path,
        cache: Path,
        hidden: tuple[Path, ...],
        cache_bytes: int = CACHE_BYTES,
        in_use: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._default = default
        self._cache = cache
        self._hidden = tuple(path.resolve() for path in hidden)
        self._cache_bytes = cache_bytes
        self._in_use = in_use
        self._building: dict[str, asyncio.Lock] = {}
        self._held: Counter[str] = Counter()
        self._clearing = asyncio.Lock()

    @asynccontextmanager
    async def prepared(self, wanted: Environment) -> AsyncIterator[Prepared]:
        """An environment that nobody deletes within the block; after it, whoever uses it must be among `in_use`.

        Raises:
            EnvironmentRefused.
        """
        found = await self._prepare(wanted)
        try:
            if found.is_held:
                await self._make_room()
            yield found
        finally:
            if found.is_held:
                self._held[found.prefix] -= 1

    async def _prepare(self, wanted: Environment) -> Prepared:
        match wanted.kind or "default":
            case "default":
                return self._prepare_default()
            case "venv":
                return self._prepare_present(Path(wanted.path))
            case "requirements":
                return await self._prepare_built(wanted.requirements)
            case other:
                raise EnvironmentRefused(f"{other!r} is not one of default, venv, requirements")

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

    async def _prepare_built(self, requirements: str) -> Prepared:
        lines = checked_requirements(requirements)
        if not _python(self._default):
            raise EnvironmentRefused(f"the default environment is not installed on this node ({self._default})")
        version = _version(self._default)
        key = hashlib.sha256("\n".join([version, *lines]).encode()).hexdigest()[:24]
        prefix = self._cache / key
        async with self._building.setdefault(key, asyncio.Lock()):
            if not (prefix / COMPLETE).exists():
                await self._build(prefix, lines)
            os.utime(prefix / COMPLETE)  # the longest unused go when room is needed
            self._held[str(prefix)] += 1
        count = sum(line[0].isalnum() for line in lines)
        return Prepared(str(prefix), f"{count} requirements ({version})", is_held=True)

    async def _build(self, prefix: Path, lines: list[str]) -> None:
        await asyncio.to_thread(_begin_anew, prefix)
        python = str(self._default / "bin" / "python")
        await _run([python, "-m", "venv", "--without-pip", str(prefix)])
        listed = prefix / "requirements.txt"
        await asyncio.to_thread(listed.write_text, "\n".join(lines) + "\n")
        await _run([*_installer(python, prefix), "--only-binary", ":all:", "-r", str(listed)])
        size_bytes = await asyncio.to_thread(_size_of, prefix)
        await asyncio.to_thread((prefix / COMPLETE).write_text, str(size_bytes))

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


def checked_requirements(text: str) -> list[str]:
    """The lines that name packages. Options, paths and URLs are refused: they would read the node's own files.

    Raises:
        EnvironmentRefused.
    """
    lines = [line.split(" #")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines:
        # Installers replace ${NAME} by what their environment holds, and say so when they fail.
        if "$" in line or (not _REQUIREMENT.fullmatch(line) and not _HASH.fullmatch(line)):
            raise EnvironmentRefused(f"the requirement {line[:80]!r} is not a package's name and version")
    if not lines:
        raise EnvironmentRefused("the list of requirements is empty")
    return lines


def _begin_anew(prefix: Path) -> None:
    if prefix.exists():
        remove_tree(prefix)
    prefix.mkdir(parents=True)


def _size_of(prefix: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in prefix.rglob("*"))


def _installer(python: str, prefix: Path) -> list[str]:
    uv = shutil.which("uv")
    target = str(prefix / "bin" / "python")
    if uv:
        # Bound read-only in jobs, where Python could not keep the bytecode that it makes.
        return [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", target]
    return [python, "-m", "pip", "--python", target, "install", "--quiet", "--disable-pip-version-check"]


async def _run(command: list[str]) -> None:
    """Runs an installer; its last lines are the reason when it fails."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=_installer_environment(),
    )
    try:
        async with asyncio.timeout(BUILD_LIMIT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        await _end(process)
        raise EnvironmentRefused(f"the requirements could not be installed within {BUILD_LIMIT_S:.0f} s") from None
    except asyncio.CancelledError:
        await _end(process)
        raise
    if process.returncode:
        last = output.decode("utf-8", "replace").strip().splitlines()[-LAST_LINES:]
        raise EnvironmentRefused("the requirements cannot be installed:\n" + "\n".join(last))


async def _end(process: asyncio.subprocess.Process) -> None:
    process.kill()
    await process.wait()


def _installer_environment() -> dict[str, str]:
    """What names indexes, proxies, certificates and caches; not the platform's own secrets."""
    kept = ("PATH", "HOME", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
    prefixes = (
        "PIP_",
        "UV_INDEX",
        "UV_CACHE",
        "UV_DEFAULT_INDEX",
        "HTTP_",
        "HTTPS_",
        "NO_PROXY",
        "http",
        "no_proxy",
    )
    return {name: value for name, value in os.environ.items() if name in kept or name.startswith(prefixes)}


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
