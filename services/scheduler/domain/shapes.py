"""Amounts of what machines have and jobs ask for, in whole numbers so that sums are exact."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from libs.common.contracts.gangs import rank_template, ranks_of
from libs.common.contracts.messages import JobTemplate, Resources

WHOLE_GPU = 1000
# A GPU sold with 24 GB shows its driver 22.5 GiB (A10, L4), one with 80 GB 79.6 GiB: the rest is the card's own.
GPU_MEMORY_SHOWN_PERCENT = 93
# Between the names of a machine that has several models.
BETWEEN_MODELS = ", "
_WORDS = re.compile(r"[a-z0-9]+")


class Shape(NamedTuple):
    """What one process asks for, or what a machine has.

    Args:
        milli_gpus: below 1000 a share of one GPU, else whole ones.
        gpu_model: asked for: any where it is empty.
        gpu_memory_bytes: of each single GPU; asked for: the least.
        images: it runs container images; asked for: it must.
    """

    milli_gpus: int
    milli_cpus: int
    memory_bytes: int
    gpu_model: str = ""
    gpu_memory_bytes: int = 0
    images: bool = False

    @property
    def amounts(self) -> tuple[int, int, int]:
        return self.milli_gpus, self.milli_cpus, self.memory_bytes

    def plus(self, other: Shape) -> Shape:
        """The sum of the amounts; what kind of GPU it is stays."""
        return Shape(
            self.milli_gpus + other.milli_gpus,
            self.milli_cpus + other.milli_cpus,
            self.memory_bytes + other.memory_bytes,
            self.gpu_model,
            self.gpu_memory_bytes,
            self.images,
        )

    def minus(self, other: Shape) -> Shape:
        return Shape(
            self.milli_gpus - other.milli_gpus,
            self.milli_cpus - other.milli_cpus,
            self.memory_bytes - other.memory_bytes,
            self.gpu_model,
            self.gpu_memory_bytes,
            self.images,
        )

    def holds(self, other: Shape) -> bool:
        """Whether there is enough of each; which GPU has room is for `Room` to say."""
        # Written out: this is asked of every node for every placement.
        return (
            self.milli_cpus >= other.milli_cpus
            and self.milli_gpus >= other.milli_gpus
            and self.memory_bytes >= other.memory_bytes
        )


Parts = tuple[Shape, ...]
NOTHING = Shape(0, 0, 0)


def shape_of(
    cpu_count: float, memory_bytes: int, gpu_count: float, gpu_model: str = "", gpu_memory_bytes: int = 0
) -> Shape:
    return Shape(round(gpu_count * 1000), round(cpu_count * 1000), memory_bytes, gpu_model, gpu_memory_bytes)


def parts_of(template: JobTemplate) -> Parts:
    """What each process of the job asks for, by rank: one for a single job."""
    ranks = (rank_template(template, rank) for rank in ranks_of(template))
    return tuple(_asked(rank.resources, images=bool(rank.container.image)) for rank in ranks)


def _asked(wish: Resources, *, images: bool) -> Shape:
    shape = shape_of(
        wish.cpu_count or 1.0, wish.memory_bytes, wish.gpu_count, wish.gpu_model.strip(), wish.gpu_memory_bytes
    )
    return shape._replace(images=images)


def summed(parts: Iterable[Shape]) -> Shape:
    total = NOTHING
    for part in parts:
        total = total.plus(part)
    return total


def is_model(wanted: str, name: str) -> bool:
    """Whether a GPU of this name is the wanted model: "h100" is an "NVIDIA H100 80GB HBM3", and no "H1000"."""
    asked, words = _WORDS.findall(wanted.lower()), _WORDS.findall(name.lower())
    return any(words[start : start + len(asked)] == asked for start in range(len(words) - len(asked) + 1))


def offers(machine: Shape, wanted: Shape) -> bool:
    """Whether the machine's GPUs are of the kind that is asked for, however many there are.

    All of them: which one of its own a machine gives is not for us to choose.
    """
    if not wanted.milli_gpus:
        return True
    names = machine.gpu_model.split(BETWEEN_MODELS)
    if wanted.gpu_model and not all(is_model(wanted.gpu_model, name) for name in names):
        return False
    return machine.gpu_memory_bytes * 100 >= wanted.gpu_memory_bytes * GPU_MEMORY_SHOWN_PERCENT


def can_run(machine: Shape, wanted: Shape) -> bool:
    """Whether the machine is of the kind that is asked for, however much it has."""
    return (machine.images or not wanted.images) and offers(machine, wanted)


def memory_text(size_bytes: int) -> str:
    """Bytes as people read them: 512 MiB, 1.5 GiB."""
    if size_bytes < 1 << 30:
        return f"{size_bytes / (1 << 20):.4g} MiB"
    return f"{size_bytes / (1 << 30):.4g} GiB"


def gpus_text(shape: Shape) -> str:
    model = f" {shape.gpu_model}" if shape.gpu_model else ""
    memory = f" with {memory_text(shape.gpu_memory_bytes)} each" if shape.gpu_memory_bytes else ""
    return f"{shape.milli_gpus / 1000:g}{model} GPU{'' if shape.milli_gpus == 1000 else 's'}{memory}"


def cpus_text(milli: int) -> str:
    return "1 CPU" if milli == 1000 else f"{milli / 1000:g} CPUs"


def shape_text(shape: Shape) -> str:
    parts = [gpus_text(shape)] if shape.milli_gpus else []
    parts.append(cpus_text(shape.milli_cpus))
    parts += [memory_text(shape.memory_bytes)] if shape.memory_bytes else []
    return ", ".join(parts)


def parts_text(parts: Parts) -> str:
    """ "1 GPU, 2 CPUs", or of a gang "4 times (1 GPU, 2 CPUs)"."""
    if len(parts) == 1:
        return shape_text(parts[0])
    runs = [(shape, len(list(run))) for shape, run in groupby(parts)]
    return " and ".join(f"{count} times ({shape_text(shape)})" for shape, count in runs)
