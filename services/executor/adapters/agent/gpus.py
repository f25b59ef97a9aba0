"""What the GPUs of this node are, by NVIDIA's own tool, which comes with the driver."""

from __future__ import annotations

import logging
import shutil
import subprocess
from dataclasses import dataclass

QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
ANSWERS_S = 20.0
MIB = 1 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gpus:
    """`model` names all kinds there are; `memory_bytes` is what each of them has at least."""

    model: str = ""
    memory_bytes: int = 0


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
    return read_gpus(asked.stdout)


def read_gpus(text: str) -> Gpus:
    """From one line for each GPU: its name, and its memory in MiB. A part of a GPU (MIG) may have no number."""
    rows = [line.rpartition(",") for line in text.splitlines() if "," in line]
    sizes = [int(size) for _, _, size in rows if size.strip().isdigit()]
    names = {name.strip().removeprefix("NVIDIA ") for name, _, _ in rows}
    return Gpus(", ".join(sorted(names)), min(sizes, default=0) * MIB)
