"""A machine with GPUs for the suite of GPUs: the real one, or this one with what looks like GPUs.

The pretended GPUs are device nodes in mounts of their own, so that nobody else on the machine meets them, with what
comes beside a driver: an nvidia-smi for the agent, a CDI spec for containers, libraries for roots without one. Ray
runs in those mounts, and with it the node agent, its sandboxes and its containers.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.executor.adapters.agent.gpus import Gpus, find_gpus
from tests.support.ray import RayHead, running_ray

COUNT = 2
MODEL, MEMORY_MIB = "NVIDIA H100 80GB HBM3", 81559
LIBRARY = "libcuda.so.1.0"
_DEVICES = (*(f"nvidia{index}" for index in range(COUNT)), "nvidiactl", "nvidia-uvm")
_OWN_DEV = """set -e
dev="$1"; cdi="$2"; shift 2
mount -t tmpfs -o mode=755,size=1m none "$dev"
for name in null zero full random urandom tty ptmx fuse net fd stdin stdout stderr; do
  [ ! -e "/dev/$name" ] && [ ! -L "/dev/$name" ] || cp -a "/dev/$name" "$dev/"
done
for name in pts shm mqueue; do
  [ ! -d "/dev/$name" ] || { mkdir "$dev/$name"; mount --rbind "/dev/$name" "$dev/$name"; }
done
for name in DEVICES; do mknod -m 666 "$dev/$name" c 1 3; done
mount --rbind "$dev" /dev
mkdir -p /var/run/cdi
mount --bind "$cdi" /var/run/cdi
[ ! -d /etc/cdi ] || mount -t tmpfs none /etc/cdi
exec "$@"
""".replace("DEVICES", " ".join(_DEVICES))
_CDI = """cdiVersion: 0.3.0
kind: nvidia.com/gpu
devices:
{devices}
containerEdits:
  env: [NVIDIA_VISIBLE_DEVICES=void, FROM_CDI=given]
  deviceNodes: [{{path: /dev/nvidiactl}}]
  mounts:
  - {{hostPath: {library}, containerPath: {library}, options: [ro, nosuid, nodev, bind]}}
"""


@dataclass(frozen=True)
class GpuMachine:
    """A Ray head on a machine with GPUs.

    Args:
        gpus: what the node's agent finds.
    """

    head: RayHead
    gpus: Gpus
    count: int
    is_real: bool

    def devices_of(self, *indices: int) -> list[str]:
        """Names in /dev."""
        return sorted(os.path.basename(path) for path in self.gpus.devices_of(indices))


@functools.cache
def why_no_gpu() -> str:
    """Why nothing can be tried on a real GPU here, or ""."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no NVIDIA GPU here: nvidia-smi is not installed"
    try:
        asked = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no NVIDIA GPU here: nvidia-smi does not answer: {error}"
    said = (asked.stdout + asked.stderr).strip().splitlines()
    if asked.returncode or not any(line.startswith("GPU ") for line in said):
        return f"no NVIDIA GPU here: nvidia-smi says: {said[-1] if said else asked.returncode}"
    return ""


@functools.cache
def why_no_pretence() -> str:
    """Why this machine cannot be made to look as if it had GPUs, or ""."""
    if os.geteuid() != 0:
        return "pretended GPUs are device nodes, which only root can make: run as root"
    with tempfile.TemporaryDirectory() as folder:
        command = 'mount -t tmpfs none "$1" && mknod -m 666 "$1/n" c 1 3 && : > "$1/n"'
        words = ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", command, "sh", folder]
        tried = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    return f"no device nodes can be made here: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def real_machine() -> Iterator[GpuMachine]:
    gpus, count = find_gpus(), len(_listed())
    with running_ray(gpus=count) as head:
        yield GpuMachine(head, gpus, count, is_real=True)


@contextmanager
def pretended_machine() -> Iterator[GpuMachine]:
    folder = Path(tempfile.mkdtemp(prefix="nabla-gpus-"))
    try:
        inside = [str(word) for word in _furnish(folder)]
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        with running_ray(gpus=COUNT, inside=inside, variables={"PATH": path}) as head:
            gpus = Gpus(MODEL.removeprefix("NVIDIA "), MEMORY_MIB << 20, {index: index for index in range(COUNT)})
            yield GpuMachine(head, gpus, COUNT, is_real=False)
    finally:
        shutil.rmtree(folder)


def _furnish(folder: Path) -> list[str | Path]:
    """Makes what the machine has; returns the command before those that shall see it."""
    folder.chmod(0o755)
    for name in ("bin", "cdi", "dev", "driver"):
        (folder / name).mkdir()
    tool = folder / "bin" / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + f"echo '{MODEL}, {MEMORY_MIB}'\n" * COUNT)
    tool.chmod(0o755)
    library = folder / "driver" / LIBRARY
    library.write_text("pretended\n")
    (folder / "driver" / "libcuda.so.1").symlink_to(LIBRARY)
    rows = (f'- {{name: "{n}", containerEdits: {{deviceNodes: [{{path: /dev/nvidia{n}}}]}}}}' for n in range(COUNT))
    (folder / "cdi" / "nvidia.yaml").write_text(_CDI.format(devices="\n".join(rows), library=library))
    script = folder / "own-dev"
    script.write_text(_OWN_DEV)
    return ["/usr/bin/unshare", "--mount", "/bin/sh", script, folder / "dev", folder / "cdi"]


def _listed() -> list[str]:
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    return [line for line in said.splitlines() if line.startswith("GPU ")]
