"""How containers get this node's GPUs: the specs of the Container Device Interface, which NVIDIA's toolkit writes.

podman reads them itself; we read which GPUs they know, so that a job is told what to do before an engine fails, and
which files of the driver a root without one needs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from libs.common.errors import NablaError
from services.executor.adapters.attempts.attempt_folder import Bind

FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
KIND = "nvidia.com/gpu"
# Where a sandbox over an unpacked image has the driver's files: a place that no image brings.
LIBRARIES_INSIDE, PROGRAMS_INSIDE = "/run/nvidia/lib", "/run/nvidia/bin"
GENERATE = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
_GENERATE_LIMIT_S = 60.0
_LIBRARY = re.compile(r"lib(cuda|cudadebugger|nvcuvid|nvoptix|nvidia-[\w-]+)\.so[.\d]*")
_PROGRAMS = frozenset({"nvidia-smi", "nvidia-debugdump"})


class NoDevices(NablaError):
    """Containers do not get these GPUs on this node; the text says what to do."""


def names_of(indices: Sequence[int], folders: Sequence[Path] = FOLDERS) -> list[str]:
    """What an engine is told for the GPUs of these numbers. As root, what the toolkit would say is had from it.

    Raises:
        NoDevices.
    """
    if not indices:
        return []
    specs = read_specs(folders)
    if not specs and _generated(folders[-1]):
        specs = read_specs(folders)
    if not specs:
        how = f"`{GENERATE}` does" if shutil.which("nvidia-ctk") else _install_first()
        raise NoDevices(f"this node does not say how containers get its GPUs; there, {how}")
    known = {str(device.get("name")) for spec in specs for device in spec.get("devices", ())}
    if missing := [index for index in sorted(indices) if str(index) not in known]:
        told = f"this node's CDI specs know no GPU {missing[0]}, only {', '.join(sorted(known)) or 'none'}"
        raise NoDevices(f"{told}; after a change of cards or driver, `{GENERATE}` there writes them anew")
    return [f"{KIND}={index}" for index in sorted(indices)]


def read_specs(folders: Iterable[Path] = FOLDERS) -> list[dict[str, Any]]:
    """Those of NVIDIA's GPUs. One that cannot be read is none: the engine says so in its own words."""
    return [spec for path in _files(folders) if (spec := _read(path)).get("kind") == KIND]


def driver_binds(folders: Iterable[Path] = FOLDERS) -> list[Bind]:
    """The driver's libraries, by each name that a loader may ask for, and its programs, to be seen below /run/nvidia.

    As the specs list them, else as the loader's own cache does.
    """
    listed = [str(mount.get("hostPath", "")) for spec in read_specs(folders) for mount in _mounts(spec)]
    files = {os.path.realpath(path) for path in listed or _cached_libraries() if path and os.path.isfile(path)}
    found = {Bind(path, f"{LIBRARIES_INSIDE}/{name}") for path in files for name in _names(Path(path))}
    programs = [path for path in listed if os.path.basename(path) in _PROGRAMS] if listed else _programs()
    found |= {Bind(path, f"{PROGRAMS_INSIDE}/{os.path.basename(path)}") for path in programs if os.path.isfile(path)}
    return sorted(found, key=lambda bind: bind.inside)


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    return (path for folder in folders for path in sorted(folder.glob("*.*")) if path.suffix in (".json", ".yaml"))


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, yaml.YAMLError):
        text = path.read_text()
        loaded = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        return loaded if isinstance(loaded, dict) else {}
    return {}


def _mounts(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for each in (spec, *spec.get("devices", ())):
        yield from (each.get("containerEdits") or {}).get("mounts") or ()


def _generated(folder: Path) -> bool:
    """Into the folder that a reboot, and with it a new driver, empties."""
    tool = shutil.which("nvidia-ctk")
    if tool is None or os.geteuid() != 0:
        return False
    with suppress(OSError, subprocess.SubprocessError):
        command = [tool, "cdi", "generate", f"--output={folder / 'nvidia.yaml'}"]
        folder.mkdir(parents=True, exist_ok=True)
        return subprocess.run(command, capture_output=True, timeout=_GENERATE_LIMIT_S, check=False).returncode == 0
    return False


def _install_first() -> str:
    return f"install nvidia-container-toolkit, and then `{GENERATE}`"


def _cached_libraries() -> list[str]:
    """What the loader's cache names, of this machine's own word size."""
    tool = shutil.which("ldconfig", path="/sbin:/usr/sbin:/bin:/usr/bin")
    if tool is None:
        return []
    listed = subprocess.run([tool, "-p"], capture_output=True, text=True, check=False).stdout
    rows = (line.partition(" => ") for line in listed.splitlines())
    return [path for name, _, path in rows if "-64" in name and _LIBRARY.fullmatch(os.path.basename(path))]


def _names(path: Path) -> Iterator[str]:
    """Its own and those of the links beside it: programs ask for libcuda.so.1, and the file is another."""
    if _LIBRARY.fullmatch(path.name):
        stem = path.name.partition(".so")[0]
        yield from (each.name for each in path.parent.glob(f"{stem}.so*") if each.resolve() == path)


def _programs() -> list[str]:
    return [found for name in sorted(_PROGRAMS) if (found := shutil.which(name))]
