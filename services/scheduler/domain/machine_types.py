"""Machine types: named shapes, so that people say "gpu-h100-1" in place of four numbers.

An installation names its own in a file; without one they are taken from the nodes there are: the whole node, its
half, quarter and so on, by GPUs where it has some and by CPUs where not.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from libs.common.contracts.messages import JobTemplate, Resources, Role
from libs.common.errors import Invalid, Unavailable
from services.scheduler.domain.cluster import Machine, Room, empty_room
from services.scheduler.domain.shapes import WHOLE_GPU, Shape, shape_of

MachineTypes = Mapping[str, Shape]
MOST_COUNTED = 1000
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
_MIB = 1 << 20
_FIELDS = {"cpus", "memory", "gpus", "gpu_model", "gpu_memory"}


class WrongMachineTypes(ValueError):
    """The file cannot be read as machine types."""


def read_types(text: str) -> MachineTypes:
    """A table for each name: cpus, memory ("16G"), gpus, gpu_model, gpu_memory.

    Raises:
        WrongMachineTypes: naming what is wrong.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise WrongMachineTypes(str(error)) from None
    return {name: _read_type(name, table) for name, table in tables.items()}


def _read_type(name: str, table: Any) -> Shape:
    if not (_NAME.fullmatch(name) and isinstance(table, dict)):
        raise WrongMachineTypes(f"{name!r} is no table, or no name of lower-case letters, digits, dots and dashes")
    if unknown := sorted(set(table) - _FIELDS):
        raise WrongMachineTypes(f"{name}: {unknown[0]} is not one of {', '.join(sorted(_FIELDS))}")
    gpus, cpus = _number(name, table, "gpus"), _number(name, table, "cpus") or 1.0
    if gpus > 1 and gpus != int(gpus):
        raise WrongMachineTypes(f"{name}: gpus is {gpus:g}; it is whole, or below 1")
    model = str(table.get("gpu_model", ""))
    return shape_of(cpus, _size(name, table, "memory"), gpus, model, _size(name, table, "gpu_memory"))


def _number(name: str, table: dict[str, Any], field: str) -> float:
    value = table.get(field, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e6:
        raise WrongMachineTypes(f"{name}: {field} is {value!r}; it is a number from 0")
    return float(value)


def _size(name: str, table: dict[str, Any], field: str) -> int:
    value = table.get(field, 0)
    match = _SIZE.fullmatch(str(value).strip())
    if isinstance(value, bool) or match is None:
        raise WrongMachineTypes(f'{name}: {field} is {value!r}; write it like "16G"')
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def detected_types(machines: Mapping[str, Machine]) -> MachineTypes:
    """Those of the nodes there are; where two nodes give one name, what both of them have.

    Types without GPUs are those of nodes without, unless there are no such nodes.
    """
    found: dict[str, Shape] = {}
    totals = [machine.total for machine in machines.values()]
    plain = [total for total in totals if total.milli_gpus < WHOLE_GPU] or [_without_gpus(total) for total in totals]
    for total in (*plain, *(total for total in totals if total.milli_gpus >= WHOLE_GPU)):
        for name, shape in _parts_of_machine(total):
            known = found.get(name, shape)
            cpus, memory = min(known.milli_cpus, shape.milli_cpus), min(known.memory_bytes, shape.memory_bytes)
            found[name] = Shape(shape.milli_gpus, cpus, memory, shape.gpu_model)
    return dict(sorted(found.items(), key=lambda item: (item[1].milli_gpus, item[1].milli_cpus, item[0])))


def _parts_of_machine(total: Shape) -> Iterator[tuple[str, Shape]]:
    model = model_word(total.gpu_model)
    gpus, cpus = total.milli_gpus // WHOLE_GPU, total.milli_cpus // 1000
    count = whole = gpus or cpus
    while count:
        name = "-".join(filter(None, ("gpu", model.lower(), str(count)))) if gpus else f"cpu-{count}"
        shares = max(1000, total.milli_cpus * count // whole // 1000 * 1000)
        memory = total.memory_bytes * count // whole // _MIB * _MIB
        yield name, Shape(count * WHOLE_GPU if gpus else 0, shares, memory, model if gpus else "")
        count //= 2


def _without_gpus(total: Shape) -> Shape:
    return Shape(0, total.milli_cpus, total.memory_bytes)


def model_word(model: str) -> str:
    """The word that tells a model from others: "H100" of "NVIDIA H100 80GB HBM3"."""
    words = re.findall(r"[A-Za-z0-9]+", model)
    telling = (word for word in words if re.search(r"\d", word) and not re.fullmatch(r"(?i)\d+gb?|hbm\d\w*", word))
    return next(telling, words[0] if words else "")


def filled_template(template: JobTemplate, types: MachineTypes) -> JobTemplate:
    """The template, and each role of its gang, with what its machine type says of all that it leaves open.

    Raises:
        Invalid, Unavailable: there is no such type.
    """
    resources = _filled(template.resources, template.machine_type, types)
    roles = tuple(_filled_role(role, resources, types) for role in template.gang.roles)
    gang = template.gang.model_copy(update={"roles": roles})
    return template.model_copy(update={"resources": resources, "gang": gang if roles else template.gang})


def _filled_role(role: Role, of_job: Resources, types: MachineTypes) -> Role:
    """A role that wishes for nothing asks for what the job does."""
    if role.resources == Resources() and not role.machine_type:
        return role.model_copy(update={"resources": of_job})
    return role.model_copy(update={"resources": _filled(role.resources, role.machine_type, types)})


def _filled(wish: Resources, name: str, types: MachineTypes) -> Resources:
    filled = wish
    if name:
        named = resources_of(_known(name, types))
        kept = {field: value for field, value in wish if value}
        filled = named.model_copy(update=kept)
    defaults: dict[str, float] = {} if filled.cpu_count else {"cpu_count": 1.0}
    if (filled.gpu_model or filled.gpu_memory_bytes) and not filled.gpu_count:
        defaults["gpu_count"] = 1.0
    return filled.model_copy(update=defaults)


def _known(name: str, types: MachineTypes) -> Shape:
    if name in types:
        return types[name]
    if not types:
        detail = "No machine type is known yet, as no node has reported."
        raise Unavailable("machine_types_unknown", detail, "Try again in a moment, or give numbers instead.")
    detail = f"There is no machine type {name[:60]!r}; there are {', '.join(types)}."
    raise Invalid("bad_template", detail, "See `nabla machines`.", field="template.machine_type")


def resources_of(shape: Shape) -> Resources:
    return Resources(
        cpu_count=shape.milli_cpus / 1000,
        memory_bytes=shape.memory_bytes,
        gpu_count=shape.milli_gpus / 1000,
        gpu_model=shape.gpu_model,
        gpu_memory_bytes=shape.gpu_memory_bytes,
    )


def startable(shape: Shape, rooms: Mapping[str, Room]) -> int:
    """How many processes of this shape could start now; counting ends at a thousand."""
    count = 0
    for room in rooms.values():
        left = room
        while count < MOST_COUNTED and (fit := left.fit(shape)):
            left, count = fit.room, count + 1
    return count


def nodes_that_have(shape: Shape, machines: Mapping[str, Machine]) -> list[str]:
    return [node for node, machine in machines.items() if empty_room(machine.total).fit(shape)]
