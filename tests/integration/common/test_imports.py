"""Importing a module does nothing but define: no thread, no socket left open, no file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import importlib, json, os, sys, threading

opened, allowed = [], tuple(sys.argv[2:])

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        name, mode, flags = os.fsdecode(arguments[0]), arguments[1] or "", arguments[2] or 0
        if (set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR)) and name != os.devnull:
            opened.append(f"open {name}")
    elif event in {"socket.connect", "os.mkdir", "os.remove", "os.rename", "subprocess.Popen", "os.fork"}:
        opened.append(f"{event} {arguments}")

import asyncssh  # looks for C libraries, with a program of the system: a library's own way of being imported
sys.addaudithook(hook)
found = {}
for name in json.loads(sys.argv[1]):
    before, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    opened.clear()
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in allowed:
            raise
        continue
    effects = list(opened)
    if threading.active_count() > before:
        effects.append(f"threads {[each.name for each in threading.enumerate()]}")
    sockets = []
    for each in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{each}")
        except OSError:
            continue
        if target.startswith("socket:"):
            sockets.append(target)
    if sockets:
        effects.append(f"sockets {sockets}")
    if effects:
        found[name] = effects
print(json.dumps(found))
"""
# Installed in the build jobs' own environment only.
OPTIONAL = ("bentoml", "numpy", "joblib", "sklearn", "torch")


def modules() -> list[str]:
    """All modules, but for entries that run something by their nature: migrations and `__main__`."""
    names = []
    for folder, package in (("services", "services"), ("libs/common", "libs.common"), ("libs/client/nabla", "nabla")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if "migrations" in parts or "migrations_env" in parts or parts[-1] == "__main__":
                continue
            names.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return names


def test_importing_has_no_effect(tmp_path: Path) -> None:
    names = modules()
    assert len(names) > 150
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'libs/client'}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(names), *OPTIONAL]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {}
    assert list(tmp_path.iterdir()) == []
