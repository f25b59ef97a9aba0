"""How a template describes several processes: which rank has which role, and what each rank is to run.

The scheduler counts with it and the executor runs by it, so there is one reading of what a gang's fields mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from libs.common.contracts.messages import JobTemplate, Resources, Role

# The roles that each type has, in the order in which ranks count through them.
ROLES: dict[str, tuple[str, ...]] = {
    "torch": ("worker",),
    "grpc": ("master", "worker", "ps"),
    "mpi": ("master", "worker"),
    "ray": ("head", "worker"),
}
# What these run is the platform's own, unless their role says otherwise: they wait for work that the first rank gives.
HELPERS = frozenset({("mpi", "worker"), ("ray", "worker")})


@dataclass(frozen=True, slots=True)
class Rank:
    """One process: its number in the gang, and which of its role it is, from 0."""

    number: int
    role: str = ""
    index: int = 0


ALONE = (Rank(0),)


def ranks_of(template: JobTemplate) -> tuple[Rank, ...]:
    """All processes of a job in order; a job that is no gang has one, without a role."""
    if not template.gang.type:
        return ALONE
    seats = [(role.name, index) for role in template.gang.roles for index in range(role.count)]
    return tuple(Rank(number, name, index) for number, (name, index) in enumerate(seats))


def rank_template(template: JobTemplate, rank: Rank) -> JobTemplate:
    """What this rank is to run: its role's words over those of the template. Of a helper the command may be empty."""
    role = next((role for role in template.gang.roles if role.name == rank.role), None)
    if role is None:
        return template
    return template.model_copy(
        update={
            "command": role.command or (() if (template.gang.type, role.name) in HELPERS else template.command),
            "env": template.env | role.env,
            # A role that wishes for nothing asks for what the job does.
            "resources": role.resources if role.resources != Resources() else template.resources,
            "machine_type": role.machine_type or template.machine_type,
            "container": role.container if _says(role) else template.container,
            # One process answers on a port and leaves a model, or each of them would.
            "ports": template.ports if rank.number == 0 else (),
            "models": template.models if rank.number == 0 else (),
        }
    )


def _says(role: Role) -> bool:
    return bool(role.container.image or role.container.dockerfile)
