"""Locks: resolved for all Pythons and machines at once, every file by its hash."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from infra.install.environments import SIZES
from infra.install.installers import LAYERS
from infra.install.machine import LOCKS, MACHINES, SUPPORTED, SetupError
from infra.install.terminal import Line

LOCKED = ("platform", "source", "serving", "notebook", "postgres", "dev")
KEPT_FOR_LOCKS = ("UV_CACHE_DIR", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_HTTP_TIMEOUT", "UV_NATIVE_TLS")


def write_locks(uv: list[str]) -> None:
    """Resolve for all Pythons and machines at once, from the index alone: local files are no source."""
    import tempfile

    sizes: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in LOCKED:
            line = Line(f"lock {name}")
            compile_lock(uv, f"{name}.in", LOCKS / f"{name}.txt", ["--no-header", *lock_options(name)])
            detailed = Path(scratch) / f"pylock.{name}.toml"
            compile_lock(uv, f"{name}.txt", detailed, ["--no-deps", "--format", "pylock.toml"])
            sizes[name] = measure(name, detailed)
            line.end(", ".join(f"{mb:.0f} MB on {on}" for on, mb in sizes[name].items()))
    SIZES.write_text(json.dumps(sizes, indent=2) + "\n")


def lock_options(name: str) -> list[str]:
    if name == "platform":
        without = [line for line in (LOCKS / "source.in").read_text().split("\n") if line and line[0] != "#"]
        return [option for package in without for option in ("--no-emit-package", package)]
    if name in LAYERS:
        return ["-c", "platform.txt"]
    return ["--no-deps", "-c", "platform.txt"] if name == "source" else []


def compile_lock(uv: list[str], source: str, target: Path, options: list[str]) -> None:
    command = [*uv, "pip", "compile", source, "--output-file", str(target), "--no-config", "--universal"]
    command += ["--upgrade", "--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
    command += ["--python-version", "3.11", "--python", sys.executable, *options]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("UV_", "PIP_")) or name in KEPT_FOR_LOCKS
    }
    done = subprocess.run(command, cwd=LOCKS, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{done.stderr}\nuv could not resolve {source}. Change the pin in it that is in the way.")


def measure(name: str, detailed: Path) -> dict[str, float]:
    """MB to download on each machine, for the worst of the Pythons; refuses a package with no wheel."""
    import tomllib

    packages = tomllib.loads(detailed.read_text())["packages"]
    totals = {on: max(download_bytes(name, packages, on, python) for python in SUPPORTED) for on in MACHINES}
    return {on: round(total / 1e6, 1) for on, total in totals.items()}


def download_bytes(name: str, packages: list[dict[str, Any]], on: str, python: tuple[int, int]) -> int:
    total = 0
    for package in packages:
        if not marker_admits(package.get("marker", ""), python):
            continue
        files = [package["sdist"]] if name == "source" else package.get("wheels", [])
        sizes = [file["size"] for file in files if name == "source" or wheel_fits(file["url"], on, python)]
        if not sizes:
            what = f"{package['name']} {package['version']}"
            where = f"Linux {on} with Python {python[0]}.{python[1]}"
            raise SetupError(f"{what} has no wheel for {where}. Pin another version, or move it to source.in.")
        total += max(sizes)
    return total


def marker_admits(marker: str, python: tuple[int, int]) -> bool:
    """Only what the locks hold: bounds on the Python, and systems that are not CPython on Linux."""
    if re.search(r"== '(win32|cygwin|darwin|Windows|Darwin|nt|pypy|PyPy)'", marker):
        return False
    for operator, major, minor in re.findall(r"python_(?:full_)?version (<|>=) '(\d+)\.(\d+)", marker):
        if (python < (int(major), int(minor))) != (operator == "<"):
            return False
    return True


def wheel_fits(url: str, on: str, python: tuple[int, int]) -> bool:
    """Whether a wheel's file name admits this Python on glibc 2.28 of this machine."""
    pythons, abis, systems = url.rsplit("/", 1)[-1].removesuffix(".whl").split("-")[-3:]
    if systems != "any" and not any(system_fits(system, on) for system in systems.split(".")):
        return False
    tag = f"cp{python[0]}{python[1]}"
    if tag in pythons.split(".") and abis in (tag, "abi3", "none"):
        return True
    if abis == "abi3":
        return any(int(found) <= python[1] for found in re.findall(r"cp3(\d+)", pythons))
    return abis == "none" and "py3" in pythons.split(".")


def system_fits(system: str, on: str) -> bool:
    if not system.endswith(on):
        return False
    glibc = re.match(r"manylinux_2_(\d+)_", system)
    return int(glibc.group(1)) <= 28 if glibc else system.startswith(("manylinux1", "manylinux2", "linux"))
