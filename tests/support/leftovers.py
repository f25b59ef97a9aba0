"""What a scenario left behind on this machine and on its cluster: nothing, or a test fails.

Jobs are found by the tag in their environment and by the names of their folders, which no other test shares.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.adapters.networks.network_host import take_wall_down
from services.executor.domain.network import installation_tag

CGROUPS = Path("/sys/fs/cgroup")
NAMESPACES = Path("/run/netns")


@contextlib.contextmanager
def installation_folder() -> Iterator[Path]:
    """A folder for one installation and its nodes, of which nothing is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="nabla-home-"))
    try:
        yield folder
    finally:
        take_walls_down(folder)
        shutil.rmtree(folder, ignore_errors=True)


def take_walls_down(top: Path) -> None:
    """Removes this machine's filters of all nodes with their folders in here, whose agents may have been killed."""
    for lock in top.rglob("agent.lock"):
        take_wall_down(installation_tag(str(lock.parent)))


def left_by(attempt_ids: Collection[str], node_dirs: Collection[Path]) -> list[str]:
    """Processes, mounts, control groups and network namespaces of these attempts, and folders on their nodes.

    Args:
        node_dirs: folders of nodes whose attempts are all over and dropped.
    """
    return [
        *(f"process {pid}: {words}" for pid, words in _tagged(attempt_ids)),
        *(f"shim {folder.path}" for folder in _folders(node_dirs) if folder.shim_is_alive()),
        *(f"mount {line}" for line in _mounts(node_dirs)),
        *(f"control group {path}" for path in _named(CGROUPS, attempt_ids)),
        *(f"network namespace {path}" for path in _named(NAMESPACES, attempt_ids)),
        *(f"folder {folder.path}" for folder in _folders(node_dirs)),
        *(f"half-built {path}" for node_dir in node_dirs for path in node_dir.glob("cache/*/*.part")),
    ]


def reserved_in(namespace_groups: Collection[str], attempt_ids: Collection[str]) -> list[str]:
    """Placement groups of these attempts among those that the cluster lists."""
    return [f"placement group {name}" for name in namespace_groups if name in set(attempt_ids)]


def _tagged(attempt_ids: Collection[str]) -> Iterator[tuple[int, str]]:
    tags = {f"NABLA_ATTEMPT_ID={attempt_id}".encode() for attempt_id in attempt_ids}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if tags & set(Path("/proc", name, "environ").read_bytes().split(b"\0")):
                yield int(name), Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]


def _folders(node_dirs: Collection[Path]) -> list[AttemptFolder]:
    return [AttemptFolder(path) for node_dir in node_dirs for path in sorted((node_dir / "attempts").glob("*"))]


def _mounts(node_dirs: Collection[Path]) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line for line in lines if any(str(node_dir) in line for node_dir in node_dirs)]


def _named(top: Path, attempt_ids: Collection[str]) -> list[Path]:
    if not top.is_dir():
        return []
    found = (Path(folder) / name for folder, names, _ in os.walk(top) for name in names)
    return [path for path in found if any(attempt_id in path.name for attempt_id in attempt_ids)]
