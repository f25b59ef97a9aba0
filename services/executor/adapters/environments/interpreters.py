"""The Pythons of a node: found where people and their tools put them, each asked once who it is."""

from __future__ import annotations

import asyncio
import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from libs.common.errors import NablaError

ASK_S = 10.0
AT_ONCE = 2
_PLACES = (
    "{pyenv}/versions/*/bin/python3",
    "{uv}/*/bin/python3",
    "/usr/local/bin/python3.[0-9]*",
    "/usr/bin/python3.[0-9]*",
)
_WHO = (
    "import json, os, platform, sys; i = sys.implementation;"
    "print(json.dumps(dict(prefix=sys.base_prefix, implementation_name=i.name,"
    " implementation_version='.'.join(map(str, i.version[:3])), os_name=os.name,"
    " platform_machine=platform.machine(), platform_release='', platform_system=platform.system(),"
    " platform_version='', python_full_version=platform.python_version(),"
    " platform_python_implementation=platform.python_implementation(),"
    " python_version='.'.join(platform.python_version_tuple()[:2]), sys_platform=sys.platform)))"
)


class NoSuchPython(NablaError):
    """This node has no such Python; the text says which it has, for the user to read."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python of the node. `markers` describe it as PEP 508 does; `base` is the installation that it belongs to."""

    path: str
    base: str
    markers: Mapping[str, str]

    @property
    def version(self) -> str:
        return self.markers["python_full_version"]


class Interpreters:
    """Finds them anew for each question; one that was asked already is asked again only when its file changed.

    Args:
        default: the Python that environments are built with unless a job wishes another.
        places: patterns of paths to look at.
    """

    def __init__(self, default: Path, places: Sequence[str] | None = None) -> None:
        self._default = default
        self._places = _usual_places() if places is None else places
        self._known: dict[tuple[str, int], Interpreter | None] = {}

    async def choose(self, wanted: str, required: str) -> Interpreter:
        """The Python of a version, or the default one when it is within what is required, or the newest that is.

        Args:
            wanted: `3.12` or `3.12.1`; empty for any.
            required: versions that the requirements are for, such as `>=3.10`; empty for any.

        Raises:
            NoSuchPython.
        """
        default = await self._ask(str(self._default))
        if default and not wanted and fits(default.version, "", required):
            return default
        found = await self._all()
        fitting = [one for one in found if fits(one.version, wanted, required)]
        if default and any(one.version == default.version for one in fitting):
            return default
        if fitting:
            return fitting[0]
        had = ", ".join(dict.fromkeys(one.version for one in found)) or "none at all"
        wish = f"Python {wanted}" if wanted else f"Python {required}, which the requirements are for"
        raise NoSuchPython(f"this node has no {wish}; it has {had}")

    async def _all(self) -> list[Interpreter]:
        paths = await asyncio.to_thread(self._candidates)
        slots = asyncio.Semaphore(AT_ONCE)

        async def ask(path: str) -> Interpreter | None:
            async with slots:
                return await self._ask(path)

        found = await asyncio.gather(*(ask(path) for path in paths))
        return sorted((one for one in found if one), key=lambda one: Version(one.version), reverse=True)

    def _candidates(self) -> list[str]:
        paths = [path for place in self._places for path in sorted(glob.glob(place))]
        real = {os.path.realpath(path): path for path in [*paths, str(self._default)]}
        return [path for path in real.values() if not path.endswith("-config") and os.access(path, os.X_OK)]

    async def _ask(self, path: str) -> Interpreter | None:
        try:
            key = (path, os.stat(path).st_mtime_ns)
        except OSError:
            return None
        if key not in self._known:
            self._known[key] = await _who(path)
        return self._known[key]


def fits(version: str, wanted: str, required: str) -> bool:
    """Whether a version is the wanted one (`3.12` is every 3.12) and among the required ones."""
    wish = wanted.strip().removeprefix("python").removeprefix("Python").strip()
    try:
        parsed = Version(version)
        return (not wish or wish == version or version.startswith(f"{wish}.")) and parsed in SpecifierSet(required)
    except (InvalidVersion, InvalidSpecifier):
        return False


async def _who(path: str) -> Interpreter | None:
    try:
        process = await asyncio.create_subprocess_exec(
            *(path, "-I", "-S", "-c", _WHO),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
        )
    except OSError:
        return None
    try:
        async with asyncio.timeout(ASK_S):
            output, _ = await process.communicate()
        said = {name: str(value) for name, value in json.loads(output).items()}
        return Interpreter(path, said.pop("prefix"), said)
    except (TimeoutError, ValueError, AttributeError, KeyError):
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _usual_places() -> list[str]:
    home = os.path.expanduser("~")
    pyenv = os.environ.get("PYENV_ROOT", f"{home}/.pyenv")
    uv = os.environ.get("UV_PYTHON_INSTALL_DIR", f"{home}/.local/share/uv/python")
    return [place.format(pyenv=pyenv, uv=uv) for place in _PLACES]
