"""Where a job's `python` comes from, and which variables it gets: both are written with --env.

A value with "=" is a variable. Any other is an environment: `default` (the platform's small one), `active` (the
virtualenv or conda environment of this terminal) or a requirements file. --requirements names a file too, in more
formats, and --python the Python to build it with.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from nabla import installations
from nabla.address import is_loopback
from nabla.cli.output import note
from nabla.cli.places import Place
from nabla.cli.values import pairs
from nabla.errors import NablaError, WorkspaceError
from nabla.objects import Environment

if TYPE_CHECKING:
    from nabla.client import Client


ENVIRONMENT_OPTIONS = (
    click.option(
        "--requirements",
        default="",
        metavar="FILE",
        help="What to install for the job: requirements.txt, pyproject.toml (with extras or groups in brackets: "
        "'pyproject.toml[train]'), uv.lock or pylock.toml. Built once on a node and kept. When left out, such a file "
        "in the workspace is taken.",
    ),
    click.option("--python", default="", metavar="VERSION", help="The Python to build it with, such as 3.12."),
)


@dataclass(frozen=True)
class EnvOptions:
    """--env, taken apart: `choice` is empty when no environment was named."""

    variables: Mapping[str, str]
    choice: str


def parse(values: tuple[str, ...]) -> EnvOptions:
    choices = [value for value in values if "=" not in value]
    if len(choices) > 1:
        raise click.BadParameter(f"two environments are named: {' and '.join(choices)}.", param_hint="--env")
    variables = pairs(tuple(value for value in values if "=" in value), "--env")
    return EnvOptions(variables, choices[0] if choices else "")


@dataclass(frozen=True)
class Wish:
    """What the command line said of the job's Python; `requirements` may end with extras in brackets."""

    choice: str = ""
    requirements: str = ""
    python: str = ""


def choose(wish: Wish, client: Client, place: Place, env: Mapping[str, str] | None = None) -> Environment:
    """The environment for a job, said on standard error unless it is the plain default.

    What is named goes before what is active in this terminal, and that before what the workspace's own files ask for.
    """
    if wish.requirements and wish.choice:
        raise click.UsageError(f"--env {wish.choice} and --requirements both name an environment.")
    active = active_environment(os.environ if env is None else env)
    if wish.requirements:
        return _from_requirements(wish, place)
    if wish.choice:
        return _named(wish, active, client)
    return _fitting(wish, active, client, place)


def _named(wish: Wish, active: Path | None, client: Client) -> Environment:
    if wish.choice == "default":
        return Environment("default", python=wish.python)
    if wish.choice == "active":
        if wish.python:
            raise click.UsageError("--env active brings its own Python; leave --python out.")
        return _active(active, client)
    return _from_file(Path(wish.choice), wish.python)


def _fitting(wish: Wish, active: Path | None, client: Client, place: Place) -> Environment:
    """Where nothing was named but, perhaps, a Python."""
    if active is not None and not wish.python and same_machine(client):
        return _offered(active)
    found = _file_in(place.folder) if place.folder else ""
    if found:
        note(f"Environment: built from {found} and kept (--env default leaves it out).")
        return Environment("workspace", found, python=wish.python)
    if active is not None and not wish.python:
        note(f"Your environment {active} is not on the server; --env active sends its packages along as requirements.")
    return Environment("default", python=wish.python)


def _from_requirements(wish: Wish, place: Place) -> Environment:
    """A file of the workspace is read there, with those that it includes; any other is sent along."""
    name, bracket, extras = wish.requirements.partition("[")
    if place.source.kind:
        return Environment("workspace", wish.requirements, python=wish.python)
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkspaceError(f"--requirements {name}: cannot read that file: {error}.", "Check the path.") from error
    if place.folder:
        with contextlib.suppress(ValueError):
            inside = path.resolve().relative_to(place.folder.resolve()).as_posix()
            return Environment("workspace", inside + bracket + extras, python=wish.python)
    return Environment("requirements", path.name + bracket + extras, text, wish.python)


def _file_in(folder: Path) -> str:
    """The file of a folder that says which packages its code needs; locks first, as they say it exactly."""
    for name in ("uv.lock", "pylock.toml", "requirements.txt"):
        if (folder / name).is_file():
            return name
    try:
        import tomllib  # type: ignore[import-not-found,unused-ignore]  # from Python 3.11 on

        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project")
        return "pyproject.toml" if isinstance(project, dict) and project.get("dependencies") else ""
    except (ImportError, OSError, ValueError):
        return ""


def active_environment(env: Mapping[str, str]) -> Path | None:
    """This terminal's virtualenv or conda environment, unless it is the one the platform itself lives in."""
    value = env.get("VIRTUAL_ENV") or env.get("CONDA_PREFIX")
    if not value:
        return None
    path = Path(value)
    platforms_own = path.name == ".venv" and (path.parent / "services" / "__init__.py").is_file()
    return path if path.is_dir() and not platforms_own else None


def same_machine(client: Client) -> bool:
    """Whether jobs see this machine's files. A loopback address alone does not tell: it may be an ssh tunnel.

    Where it cannot be told the answer is no: packages sent along needlessly cost time, a folder that is not there
    costs the job.
    """
    if not is_loopback(urlsplit(client.context.url).hostname or ""):
        return False
    if client.context.installed_here:
        return True
    return installations.is_here(client.installation_id())


def _offered(active: Path) -> Environment:
    note(f"Environment {active} (active in this terminal; --env default leaves it out).")
    return Environment("venv", str(active))


def _active(active: Path | None, client: Client) -> Environment:
    if active is None:
        raise NablaError(
            "--env active: no virtualenv or conda environment is active in this terminal.",
            "Activate one first, or use --env default or --env requirements.txt.",
        )
    if same_machine(client):
        return Environment("venv", str(active))
    frozen = freeze(active)
    if frozen.left_out:
        note(f"Left out (not from a package index): {', '.join(frozen.left_out)}")
    if not frozen.requirements:
        raise NablaError(
            f"--env active: no package of {active} can be sent along as a requirement.",
            "Install some there, or use --env default or --env requirements.txt.",
        )
    note(f"Environment: the {len(frozen.requirements)} packages of {active}, as requirements.")
    return Environment("requirements", requirements="".join(f"{line}\n" for line in frozen.requirements))


@dataclass(frozen=True)
class Frozen:
    """An environment's packages as NAME==VERSION, and the names of those that no package index has in that form."""

    requirements: tuple[str, ...]
    left_out: tuple[str, ...]


# Asked of the environment's own Python, since many have no pip (uv makes them without). `-I`: only what is installed
# there counts, not this folder or PYTHONPATH. A package from a folder, an archive or a repository has a
# direct_url.json, and conda's have one too, of the machine that built them; one that lies outside of all
# site-packages is of an older kind of editable install.
_LISTING = """
import json, os, site, sys, sysconfig
from importlib.metadata import distributions
homes = {*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
homes = {os.path.realpath(home) for home in homes}
found = []
for one in distributions():
    if one.metadata["Name"] and one.version:
        conda = (one.read_text("INSTALLER") or "").strip() == "conda"
        home = os.path.realpath(str(one.locate_file("")))
        indexed = conda or home in homes and one.read_text("direct_url.json") is None
        found.append([one.metadata["Name"], one.version, indexed])
print(json.dumps(found))
"""
# pip is not needed to run anything, and jobs get this client from the platform.
_NOT_SENT = frozenset({"pip", "nabla"})


def freeze(environment: Path) -> Frozen:
    """The packages of an environment, read by its own Python."""
    import subprocess

    python = environment / ("python.exe" if os.name == "nt" else "bin/python")
    if os.name == "nt" and not python.exists():
        python = environment / "Scripts" / "python.exe"
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", _LISTING], capture_output=True, text=True, timeout=60, check=True
        )
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NablaError(
            f"Cannot list the packages of {environment}: {said[-1] if said else type(error).__name__}",
            "Write them into a requirements.txt and use --env requirements.txt.",
        ) from error
    first: dict[str, tuple[str, str, bool]] = {}
    for name, version, indexed in found:  # as in an import, the first of a name is the one that is used
        first.setdefault(re.sub(r"[-_.]+", "-", name).lower(), (name, version, indexed))
    kept = [first[name] for name in sorted(first) if name not in _NOT_SENT]
    # An index has 2.1.0 where a build of it calls itself 2.1.0+cu118.
    return Frozen(
        tuple(f"{name}=={version.partition('+')[0]}" for name, version, indexed in kept if indexed),
        tuple(name for name, _, indexed in kept if not indexed),
    )


def _from_file(path: Path, python: str) -> Environment:
    try:
        return Environment("requirements", path.name, path.read_text(encoding="utf-8"), python)
    except (OSError, UnicodeDecodeError) as error:
        raise WorkspaceError(
            f"--env {path}: cannot read that file: {error}.",
            "Give KEY=VALUE for a variable, or active, default or a requirements file for an environment.",
        ) from error
