"""Where this runs: the checkout, the machine, and what its Pythons and settings say."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "infra" / "locks"
SUPPORTED = ((3, 13), (3, 12), (3, 11))
MACHINES = ("x86_64", "aarch64")
# Settings that would put packages elsewhere than told, or let in files that the locks do not name.
REDIRECTS = frozenset(
    """
    PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONPATH PYTHONPYCACHEPREFIX VIRTUAL_ENV
    UV_PYTHON UV_SYSTEM_PYTHON UV_TARGET UV_PREFIX UV_CONSTRAINT UV_OVERRIDE UV_EXCLUDE UV_NO_BINARY
    PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER PIP_PYTHON PIP_CONSTRAINT PIP_NO_BINARY PIP_NO_DEPS
    PIP_REQUIRE_VIRTUALENV PIP_FIND_LINKS
    """.split()
)


class SetupError(Exception):
    """What happened, why, and what to do: the whole text a person sees."""


def has_module(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def answers(command: list[str]) -> bool:
    """A pyenv shim exists for a Python that is not chosen: only starting it tells."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    return False


def machine() -> str:
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine())


def child_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in REDIRECTS}


def installer_environment() -> dict[str, str]:
    patient = {"UV_HTTP_TIMEOUT": "120", "UV_COMPILE_BYTECODE_TIMEOUT": "600", "PIP_DEFAULT_TIMEOUT": "120"}
    return {**patient, **child_environment(), "NO_COLOR": "1"}


def refuse_unsupported_machine() -> None:
    if not sys.platform.startswith("linux") or machine() not in MACHINES:
        raise SetupError(
            f"Nabla runs on Linux, x86-64 or aarch64; this is {platform.system()} on {platform.machine()}: "
            "Ray clusters, sandboxes and GPUs need it. On Windows use WSL 2, on a Mac a Linux machine."
        )


def version_of(python: str) -> tuple[int, ...]:
    """What the interpreter itself says; () when it does not start."""
    ask = [python, "-c", "import sys; print(sys.version_info[0], sys.version_info[1])"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired, ValueError):
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=False, env=child_environment())
        return tuple(int(part) for part in answer.stdout.split())
    return ()
