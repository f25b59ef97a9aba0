"""What the GPUs of this node are and do, by NVIDIA's own tool and library, which come with the driver."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
ANSWERS_S = 20.0
MIB = 1 << 20
CONTROL, UNIFIED_MEMORY = "/dev/nvidiactl", "/dev/nvidia-uvm"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gpus:
    """Of a node.

    Args:
        model: names all kinds there are.
        memory_bytes: what each of them has at least.
        minors: of each GPU by its number, that of its device node. The two differ where the driver found the cards in
            another order than the bus has them, and in a container that was given some of its machine's.
    """

    model: str = ""
    memory_bytes: int = 0
    minors: Mapping[int, int] = field(default_factory=dict)

    def devices_of(self, indices: Sequence[int]) -> list[str]:
        """Device nodes, in the order of the GPUs' numbers; none for GPUs that Ray was only told of."""
        paths = [f"/dev/nvidia{self.minors.get(index, index)}" for index in sorted(indices)]
        return paths if self.minors or all(map(os.path.exists, paths)) else []


def find_gpus() -> Gpus:
    """Blocks for as long as the driver takes to wake up. Without the tool nothing is known, and nothing is said."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Gpus()
    try:
        asked = subprocess.run([tool, *QUERY], capture_output=True, text=True, timeout=ANSWERS_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the GPUs of this node are not known", extra={"reason": repr(error)})
        return Gpus()
    _load_unified_memory()
    found = read_gpus(asked.stdout)
    return Gpus(found.model, found.memory_bytes, read_minors(load_nvml()))


def read_gpus(text: str) -> Gpus:
    """From one line for each GPU: its name, and its memory in MiB. A part of a GPU (MIG) may have no number."""
    rows = [line.rpartition(",") for line in text.splitlines() if "," in line]
    sizes = [int(size) for _, _, size in rows if size.strip().isdigit()]
    names = {name.strip().removeprefix("NVIDIA ") for name, _, _ in rows}
    return Gpus(", ".join(sorted(names)), min(sizes, default=0) * MIB)


def load_nvml() -> Any:
    """The driver's library, ready to be asked; None without package, driver or device."""
    with suppress(Exception):
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return nvml
    return None


def read_minors(nvml: Any) -> dict[int, int]:
    found: dict[int, int] = {}
    for index in range(nvml.nvmlDeviceGetCount() if nvml else 0):
        with suppress(nvml.NVMLError):
            found[index] = int(nvml.nvmlDeviceGetMinorNumber(nvml.nvmlDeviceGetHandleByIndex(index)))
    return found


class GpuMeter:
    """Utilisation, memory and power by the node's own numbers of GPUs.

    Args:
        nvml: see `load_nvml`; without one there is nothing to read.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def read(self, indices: Sequence[int]) -> dict[str, float]:
        found: dict[str, float] = {}
        for index in indices if self._nvml else ():
            with suppress(self._nvml.NVMLError):
                device = self._nvml.nvmlDeviceGetHandleByIndex(index)
                found[f"system/gpu_{index}_percent"] = float(self._nvml.nvmlDeviceGetUtilizationRates(device).gpu)
                found[f"system/gpu_{index}_memory_bytes"] = float(self._nvml.nvmlDeviceGetMemoryInfo(device).used)
                found[f"system/gpu_{index}_power_watts"] = self._nvml.nvmlDeviceGetPowerUsage(device) / 1000
        return found


def _load_unified_memory() -> None:
    """Its module and device node come with root's first use of CUDA, and no job is root: CUDA would not start."""
    tool = shutil.which("nvidia-modprobe")
    if tool and os.path.exists(CONTROL) and not os.path.exists(UNIFIED_MEMORY):
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run([tool, "-u", "-c=0"], capture_output=True, timeout=ANSWERS_S, check=False)
