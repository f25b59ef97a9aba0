"""Gangs on the command line: how many processes of which role, and what each role runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, TypeVar

import click

from nabla.objects import Container, Gang, Role

TYPES = ("torch", "grpc", "mpi", "ray")
F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class GangOptions:
    """What the command line said of the gang."""

    type: str
    workers: int
    parameter_servers: int
    master_command: str
    worker_command: str
    ps_command: str
    master_machine_type: str
    worker_machine_type: str
    ps_machine_type: str
    master_container: str
    worker_container: str
    ps_container: str


def gang_options(function: F) -> F:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _of_role(role: str, *names: str) -> tuple[Callable[[F], F], ...]:
    """The three things that each role may have of its own."""
    spelled = (role, *names)
    return (
        click.option(
            *(f"--{name}-command" for name in spelled),
            f"{role}_command",
            default="",
            help=f"What the {role} runs, as a line for the shell; COMMAND when left out.",
        ),
        click.option(
            *(f"--{name}-machine-type" for name in spelled),
            f"{role}_machine_type",
            default="",
            metavar="TYPE",
            help=f"Of the {role}, in place of --machine-type.",
        ),
        click.option(
            *(f"--{name}-container" for name in spelled),
            f"{role}_container",
            default="",
            metavar="IMAGE",
            help=f"Of the {role}, in place of the job's own.",
        ),
    )


_OPTIONS = (
    click.option(
        "--type",
        type=click.Choice(TYPES),
        default="torch",
        show_default=True,
        help="torch: equal workers, as torchrun starts them. grpc: a master, workers and parameter servers, which find "
        "TF_CONFIG. mpi: a master that runs mpirun over workers. ray: COMMAND on the head of a private Ray cluster.",
    ),
    click.option(
        "--workers",
        "--worker-count",
        "workers",
        type=click.IntRange(1),
        required=True,
        help="How many workers. With grpc one of them is the master; with mpi and ray the master comes on top.",
    ),
    click.option(
        "--parameter-servers",
        "--ps-count",
        "--parameter-server-count",
        "parameter_servers",
        type=click.IntRange(0),
        default=0,
        help="How many parameter servers; grpc alone has them.",
    ),
    *_of_role("master"),
    *_of_role("worker"),
    *_of_role("ps", "parameter-server"),
)


def gang_of(said: GangOptions) -> Gang:
    """The gang, with its roles in the order in which ranks count through them.

    Raises:
        click.UsageError: something is said of a role that the type does not have.
    """
    if said.parameter_servers and said.type != "grpc":
        raise click.UsageError(f"--parameter-servers is for --type grpc; {said.type} has none.")
    counts = {
        "torch": {"worker": said.workers},
        "grpc": {"master": 1, "worker": said.workers - 1, "ps": said.parameter_servers},
        "mpi": {"master": 1, "worker": said.workers},
        "ray": {"head": 1, "worker": said.workers},
    }[said.type]
    words = {"head": "master"}
    roles = tuple(_role(said, name, words.get(name, name), count) for name, count in counts.items() if count)
    present = {words.get(role.name, role.name) for role in roles}
    for name in {"master", "worker", "ps"} - present:
        if any(getattr(said, f"{name}_{what}") for what in ("command", "machine_type", "container")):
            raise click.UsageError(f"Something is said of the {name}, and a gang of --type {said.type} here has none.")
    return Gang(said.type, roles)


def _role(said: GangOptions, name: str, word: str, count: int) -> Role:
    command = getattr(said, f"{word}_command")
    return Role(
        name=name,
        count=count,
        command=(command,) if command else (),
        machine_type=getattr(said, f"{word}_machine_type"),
        container=Container(image=getattr(said, f"{word}_container")),
    )


def command_of(gang: Gang, said: tuple[str, ...]) -> tuple[str, ...]:
    """COMMAND, or that of the first role that has its own.

    Raises:
        click.UsageError: there is none.
    """
    command = said or next((role.command for role in gang.roles if role.command), ())
    if not command:
        raise click.UsageError("There is nothing to run: add COMMAND, or --worker-command and the like.")
    return command
