"""nabla experiments"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import click

from nabla.cli.gangs import GangOptions, command_of, gang_of, gang_options
from nabla.cli.output import details, print_json, table
from nabla.cli.projects import LIMIT
from nabla.cli.run import SUBMITTING
from nabla.cli.session import Group, Session, pass_session
from nabla.cli.submission import Options, submission_options, submit_and_follow
from nabla.objects import Experiment

GANG_FIELDS = tuple(field.name for field in fields(GangOptions))


@click.group(cls=Group)
def experiments() -> None:
    """Start and list experiments: a named template plus its jobs."""


@experiments.group("run", cls=Group)
def run_experiment() -> None:
    """Start an experiment."""


@run_experiment.command(
    context_settings=SUBMITTING,
    example="nabla experiments run singlenode --name baseline --project digits -- python train.py",
)
@submission_options
@pass_session
def singlenode(session: Session, /, **said: object) -> int:
    """One job on one machine; the same as `nabla run`."""
    return submit_and_follow(session, Options(**said), Path.cwd())  # type: ignore[arg-type]


@run_experiment.command(
    context_settings=SUBMITTING,
    example=(
        "nabla experiments run multinode --type torch --workers 4 --gpus 1 -- python train.py",
        'nabla experiments run multinode --type grpc --workers 2 --parameter-servers 1 --ps-command "python ps.py" '
        "-- python worker.py",
        "nabla experiments run multinode --type mpi --workers 3 -- mpirun -n 4 python train.py",
    ),
)
@gang_options
@partial(submission_options, command_required=False)
@pass_session
def multinode(session: Session, /, **said: object) -> int:
    """Several processes of one job, on one node or many: all of them start, or none does.

    Every process runs COMMAND with the resources asked for, unless its role has a command or a machine type of its
    own, and finds its peers in its environment. When one fails the others are stopped.
    """
    gang = gang_of(GangOptions(**{name: said.pop(name) for name in GANG_FIELDS}))  # type: ignore[arg-type]
    options = Options(**said)  # type: ignore[arg-type]
    return submit_and_follow(session, replace(options, command=command_of(gang, options.command)), Path.cwd(), gang)


@experiments.command("list", example="nabla experiments list --project digits")
@click.option("--project", default="", help="Only this project's.")
@LIMIT
@pass_session
def list_experiments(session: Session, project: str, limit: int) -> None:
    """List experiments, the newest first."""
    found = list(session.client().experiments.list(project, limit))
    if session.as_json:
        return print_json(found)
    rows = [(e.id, e.name, e.kind, _states(e), e.created_at) for e in found]
    table(("ID", "NAME", "KIND", "JOBS", "CREATED"), rows, "No experiments. `nabla run -- COMMAND` starts one.")


@experiments.command(example="nabla experiments get ex01jabc")
@click.argument("experiment")
@pass_session
def get(session: Session, experiment: str) -> None:
    """Show an experiment and its jobs."""
    found = session.client().experiments.get(experiment)
    if session.as_json:
        return print_json(found)
    details(
        [
            ("id", found.id),
            ("name", found.name),
            ("kind", found.kind),
            ("project", found.project_id),
            ("created", found.created_at),
        ]
    )
    rows = [(job.id, job.template.name, job.state, job.detail) for job in found.jobs]
    table(("ID", "NAME", "STATE", "DETAIL"), rows, "It has no job.")


def _states(experiment: Experiment) -> str:
    return ", ".join(job.state for job in experiment.jobs)
