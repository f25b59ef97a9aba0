"""Where a job's `python` comes from, and which variables it gets: both are written with --env.

A value with "=" is a variable. Any other is an environment: `default` (the platform's small one), `active` (the
virtualenv or conda environment of this terminal) or a requirements file.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click

from nabla import installations
from nabla.address import is_loopback
from nabla.cli.output import note
from nabla.cli.values import pairs
from nabla.client import Client
from nabla.errors import NablaError, WorkspaceError
from nabla.objects import Environment


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


def choose(choice: str, client: Client, env: Mapping[str, str] | None = None) -> Environment:
    """The environment for a job, said on standard error unless it is the plain default."""
    active = active_environment(os.environ if env is None else env)
    if choice in ("", "default"):
        if choice or active is None:
            return Environment()
        return _offered(active, client)
    if choice == "active":
        return _active(active, client)
    return _from_file(Path(choice))


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


def _offered(active: Path, client: Client) -> Environment:
    if same_machine(client):
        note(f"Environment {active} (active in this terminal; --env default leaves it out).")
        return Environment("venv", str(active))
    note(f"Your environment {active} is not on the server; --env active sends its packages along as requirements.")
    return Environment()


def _active(active: Path | None, client: Client) -> Environment:
    if active is None:
        raise NablaError(
            "--env active: no virtualenv or conda environment is active in this terminal.",
            "Activate one first, or use --env default or --env requirements.txt.",
        )
    if same_machine(client):
        return Environment("venv", str(active))
    frozen = freeze(active)
    note(f"Environment: the {len(frozen.splitlines())} packages of {active}, as requirements.")
    return Environment("requirements", requirements=frozen)


def freeze(environment: Path) -> str:
    """What `pip freeze` says, without what exists only on this machine (editable installs and local paths)."""
    python = environment / ("python.exe" if os.name == "nt" else "bin/python")
    if os.name == "nt" and not python.exists():
        python = environment / "Scripts" / "python.exe"
    try:
        done = subprocess.run(
            [str(python), "-m", "pip", "freeze"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NablaError(
            f"Cannot list the packages of {environment}: {error}",
            "Write them into a requirements.txt and use --env requirements.txt.",
        ) from error
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith(("-e ", "#"))]
    return "".join(f"{line}\n" for line in lines if " @ file:" not in line)


def _from_file(path: Path) -> Environment:
    try:
        return Environment("requirements", requirements=path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WorkspaceError(
            f"--env {path}: cannot read that file: {error}.",
            "Give KEY=VALUE for a variable, or active, default or a requirements file for an environment.",
        ) from error
