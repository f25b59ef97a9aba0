"""Builds a Python environment with an installer in a sandbox, and writes down exactly what it became."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from services.executor.adapters.environments.interpreters import Interpreter
from services.executor.adapters.environments.package_index import find_index
from services.executor.adapters.environments.toolbox import Tell, Tool, Toolbox, ToolFailed
from services.executor.adapters.runtimes.job_view import environment_mounts
from services.executor.adapters.workspaces.transfer import remove_tree
from services.executor.domain.requirements import Packages

BUILD_LIMIT_S = 1800.0
# What a team's downloads and own builds of packages may take; beyond it they are forgotten together.
DOWNLOADS_BYTES = 5_000_000_000
MAX_REPORT_BYTES = 64 << 20
# In a built environment: every package with its version and hash.
RECORD = "nabla-environment.txt"
_ABOUT = "# python: "


@dataclass(frozen=True, slots=True)
class BuildOrder:
    """An environment that is to be; `team_id`: nothing that the code of one team wrote is used by another."""

    prefix: Path
    packages: Packages
    python: Interpreter
    team_id: str


class InstallerBuilder:
    """Builds with uv where the node has it, else with the pip of the default environment.

    Args:
        default: the prefix of the platform's small environment, which has pip.
        downloads: a folder per team for what installers keep.
        hosts: of the settings, see `find_index`.
        installer: auto, uv or pip.
    """

    def __init__(
        self, toolbox: Toolbox, default: Path, downloads: Path, hosts: tuple[str, ...] = (), installer: str = "auto"
    ) -> None:
        self._toolbox = toolbox
        self._default = default
        self._downloads = downloads
        self._hosts = hosts
        self._installer = installer

    async def build(self, order: BuildOrder, tell: Tell) -> None:
        """Raises ToolFailed, ToolStopped, OSError."""
        downloads = self._downloads / order.team_id
        await asyncio.to_thread(_prepare, order, downloads)
        pip = str(self._default / "bin" / "python")
        index = await find_index(pip, self._hosts)
        uv = shutil.which("uv") if self._installer != "pip" else None
        install = self._with_uv(uv, order) if uv else self._with_pip(pip, order)
        script = '"$1" -m venv --without-pip "$2"; shift 2; ' + (install.script if order.packages.lines else "")
        shown = await asyncio.to_thread(_shown, order, self._default, [*index.files, *([Path(uv)] if uv else [])])
        tool = Tool(
            command=["/bin/sh", "-ec", script, "sh", order.python.path, str(order.prefix), *install.words],
            env=dict(index.env) | {"PIP_CACHE_DIR": f"{downloads}/pip", "UV_CACHE_DIR": f"{downloads}/uv"} | _QUIET,
            writable=(order.prefix, downloads),
            readable=shown,
            places=index.places,
            limit_s=BUILD_LIMIT_S,
        )
        inside = f"{order.prefix}/"
        try:
            await self._toolbox.run(tool, lambda line: tell(line.replace(inside, "")))
        except ToolFailed as error:
            raise ToolFailed(str(error).replace(inside, "")) from error
        await asyncio.to_thread(_finish, order)

    def _with_pip(self, pip: str, order: BuildOrder) -> _Install:
        """`--python` makes pip install into another environment than its own."""
        words = [pip, "-m", "pip", "--python", f"{order.prefix}/bin/python", "install", "--no-color"]
        words += ["--progress-bar", "off", "--no-warn-script-location", "--report", str(order.prefix / _REPORT)]
        words += self._wheels_alone()
        return _Install('exec "$@"', [*words, *_lists(order)])

    def _with_uv(self, uv: str, order: BuildOrder) -> _Install:
        """Resolved first, as uv tells hashes only there."""
        target, lock = f"{order.prefix}/bin/python", str(order.prefix / RECORD)
        wheels = " ".join(self._wheels_alone())
        script = (
            'uv=$1 python=$2 lock=$3 list=$4 limits=$5; "$uv" pip compile --python "$python" --quiet --no-header '
            f'--no-annotate --generate-hashes {wheels} -c "$limits" -o "$lock" "$list"; '
            f'exec "$uv" pip install --python "$python" --compile-bytecode --no-deps {wheels} -r "$lock"'
        )
        return _Install(script, [uv, target, lock, str(order.prefix / _LIST), str(order.prefix / _CONSTRAINTS)])

    def _wheels_alone(self) -> list[str]:
        """Without walls no code of a stranger's is run only to build a package."""
        return [] if self._toolbox.walled else ["--only-binary", ":all:"]


@dataclass(frozen=True, slots=True)
class _Install:
    script: str
    words: list[str]


_LIST, _CONSTRAINTS, _REPORT = "requirements.txt", "constraints.txt", "report.json"
_QUIET = {"PYTHONDONTWRITEBYTECODE": "", "UV_NO_CONFIG": "1", "UV_LINK_MODE": "copy", "UV_NO_PROGRESS": "1"}


def _lists(order: BuildOrder) -> list[str]:
    return ["-r", str(order.prefix / _LIST), "-c", str(order.prefix / _CONSTRAINTS)]


def _prepare(order: BuildOrder, downloads: Path) -> None:
    if order.prefix.exists():
        remove_tree(order.prefix)
    order.prefix.mkdir(parents=True)
    (order.prefix / _LIST).write_text("".join(f"{line}\n" for line in order.packages.lines))
    (order.prefix / _CONSTRAINTS).write_text("".join(f"{line}\n" for line in order.packages.constraints))
    if downloads.exists() and size_of(downloads) > DOWNLOADS_BYTES:
        remove_tree(downloads)
    downloads.mkdir(parents=True, exist_ok=True)


def _shown(order: BuildOrder, default: Path, files: list[Path]) -> tuple[Path, ...]:
    pip = [Path(mount.source) for mount in environment_mounts(str(default))]
    return tuple(path for path in (*pip, *_bases(order), *files) if path.exists())


def _bases(order: BuildOrder) -> set[Path]:
    """The installation of its Python, in both spellings; what is in /usr is in every sandbox."""
    found = {Path(order.python.base), Path(os.path.realpath(order.python.base))}
    return {path for path in found if not path.is_relative_to("/usr")}


def size_of(folder: Path) -> int:
    """Bytes on the disk, as far as it can be told while somebody works in the folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total


def _finish(order: BuildOrder) -> None:
    """Believes nothing that the build left: a package's own code may have written it."""
    mounts = {Path(mount.source) for mount in environment_mounts(str(order.prefix))}
    if not mounts <= {order.prefix, *_bases(order)}:
        raise ToolFailed("a package changed which Python its environment belongs to")
    record, report = order.prefix / RECORD, order.prefix / _REPORT
    machine = order.python.markers.get("platform_machine", "")
    try:
        reported, locked = _read_own(report), _read_own(record)
        body = "".join(_pinned(json.loads(reported))) if reported else locked
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolFailed(f"the installer does not say what it installed: {error!r}") from error
    report.unlink(missing_ok=True)
    write_new(record, f"{_ABOUT}{order.python.version} on {machine}\n{body}")
    if os.geteuid() == 0:
        os.chown(order.prefix, 0, 0)


def _read_own(path: Path) -> str:
    """Follows no link; empty when it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path.name} is no file")
        return file.read(MAX_REPORT_BYTES).decode("utf-8", "replace")


def write_new(path: Path, text: str) -> None:
    """In place of whatever has this name, following no link."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _pinned(report: Any) -> list[str]:
    """From pip's installation report, the hash of exactly the file that was installed."""
    lines = []
    for item in report.get("install", ()):
        meta = item["metadata"]
        hashes = item.get("download_info", {}).get("archive_info", {}).get("hashes", {})
        told = [f" --hash={name}:{value}" for name, value in hashes.items()]
        lines.append(f"{canonicalize_name(meta['name'])}=={meta['version']}{''.join(told)}\n")
    return sorted(lines)


def python_of_record(text: str) -> str:
    """The version of Python that a record is of; empty for a list that is none."""
    first = text.partition("\n")[0]
    return first.removeprefix(_ABOUT).split(" ")[0] if first.startswith(_ABOUT) else ""
