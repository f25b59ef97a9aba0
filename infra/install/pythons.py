"""The Python that the rest runs on: this one, another on the PATH, or one that uv has."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys

from infra.install.installers import find_uv
from infra.install.machine import ROOT, SUPPORTED, SetupError, version_of
from infra.install.terminal import say


def move_to_supported_python() -> None:
    """Start again under a supported Python when this is another one."""
    if sys.version_info[:2] in SUPPORTED:
        return
    found = find_python() or fetch_python()
    if found is None or os.environ.get("NABLA_SETUP_MOVED"):
        raise SetupError(no_python_message(sys.version_info[0], sys.version_info[1]))
    os.environ["NABLA_SETUP_MOVED"] = "1"
    sys.stdout.flush()
    os.execv(found, [found, str(ROOT / "infra" / "setup.py"), *sys.argv[1:]])


def find_python(path: str | None = None) -> str | None:
    for major, minor in SUPPORTED:
        found = shutil.which(f"python{major}.{minor}", path=path)
        if found and version_of(found) == (major, minor):
            return found
    return None


def fetch_python() -> str | None:
    """uv may have a Python of its own, or may be able to fetch one; not relied on."""
    uv = find_uv()
    if uv is None:
        return None
    say("There is no Python 3.11, 3.12 or 3.13 on the PATH: asking uv for one, which may download it.")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run([*uv, "python", "install", "3.13"], capture_output=True, timeout=300, check=False)
        asked = subprocess.run([*uv, "python", "find", "3.13"], capture_output=True, text=True, timeout=60, check=False)
        found = asked.stdout.strip()
        if found and version_of(found) == (3, 13):
            return found
    return None


def no_python_message(major: int, minor: int) -> str:
    return (
        f"This is Python {major}.{minor}; Nabla needs 3.11, 3.12 or 3.13 (Ray has no build for others), and "
        "none of them is on the PATH. On Debian 12 and 13 and on Ubuntu 24.04 run "
        "`apt-get update && apt-get install python3 python3-venv` as root; elsewhere install uv, which brings one with "
        "`uv python install 3.13`."
    )
