"""nabla deployments"""

from __future__ import annotations

from pathlib import Path

import click

from nabla.cli.output import details, note, print_json, table
from nabla.cli.projects import LIMIT
from nabla.cli.session import Group, Session, pass_session
from nabla.cli.values import named_version, size, span
from nabla.objects import Deployment, Resources, Revision


@click.group(cls=Group)
def deployments() -> None:
    """Serve a registered model behind an endpoint."""


@deployments.command(example="nabla deployments create digits --model digits --wait")
@click.argument("name")
@click.option("--model", required=True, metavar="NAME[:VERSION]", help="The newest version when none is named.")
@click.option("--project", default="", help="The project's name or id; this folder's when left out.")
@click.option("--cpus", type=float, default=0.0, help="CPU cores of a replica.")
@click.option("--memory", type=size, default="0", help="Memory of a replica, such as 2G.")
@click.option("--gpus", type=float, default=0.0, help="GPUs of a replica.")
@click.option(
    "--machine-type",
    "--machine",
    "machine_type",
    default="",
    metavar="TYPE",
    help="What the options above leave open; see `nabla machines`.",
)
@click.option("--wait", is_flag=True, help="Until it serves or has failed; the exit code says which.")
@click.option("--timeout", type=span, default="10m", show_default=True, help="How long to wait.")
@pass_session
def create(
    session: Session,
    name: str,
    model: str,
    project: str,
    cpus: float,
    memory: int,
    gpus: float,
    machine_type: str,
    wait: bool,
    timeout: float,
) -> int:
    """Deploy a model."""
    from nabla.cli.project_choice import choose_project

    named_version(model)
    client = session.client(60.0)
    chosen = choose_project(client, project, Path.cwd())
    wishes = Resources(cpus, memory, gpus)
    made = client.deployments.create(
        name,
        project=chosen,
        model=model,
        resources=wishes if wishes != Resources() else None,
        machine_type=machine_type,
    )
    if wait:
        made = client.deployments.wait(made.id, timeout, _say_state)
    _show(session, made, client.context.url)
    if made.state == "failed":
        note(f"The deployment failed: {made.detail}")
        _say_log(made.revision or Revision())
    elif not wait:
        note(f"Follow it with `nabla deployments get {name}`.")
    return 1 if made.state == "failed" else 0


@deployments.command("list", example="nabla deployments list")
@click.option("--project", default="", help="Only this project's.")
@LIMIT
@pass_session
def list_deployments(session: Session, project: str, limit: int) -> None:
    """List deployments."""
    found = list(session.client().deployments.list(project, limit))
    if session.as_json:
        return print_json(found)
    rows = [(d.id, d.name, d.state, _model(d), d.path, d.created_at) for d in found]
    table(
        ("ID", "NAME", "STATE", "MODEL", "PATH", "CREATED"),
        rows,
        "No deployments. Make one with `nabla deployments create NAME --model MODEL`.",
    )


@deployments.command(example="nabla deployments get digits")
@click.argument("deployment")
@pass_session
def get(session: Session, deployment: str) -> None:
    """Show a deployment, its endpoint and the token for it."""
    client = session.client()
    _show(session, client.deployments.get(deployment), client.context.url)


@deployments.command(example="nabla deployments delete digits")
@click.argument("deployment")
@pass_session
def delete(session: Session, deployment: str) -> None:
    """Stop and delete a deployment. The model stays."""
    gone = session.client().deployments.delete(deployment)
    if session.as_json:
        return print_json(gone)
    note(f"Deleting {gone.name}.")


def _show(session: Session, deployment: Deployment, url: str) -> None:
    if session.as_json:
        return print_json(deployment)
    revision = deployment.revision or Revision()
    details(
        [
            ("id", deployment.id),
            ("name", deployment.name),
            ("state", deployment.state),
            ("detail", deployment.detail),
            ("model", _model(deployment)),
            ("endpoint", f"{url}{deployment.path}/predict" if deployment.path else ""),
            ("token", deployment.endpoint_token),
            ("host", deployment.host),
            ("build job", revision.build_job_id),
            ("replica job", revision.replica_job_id),
            ("ready", deployment.ready_at),
        ]
    )


def _say_log(revision: Revision) -> None:
    job_id = revision.replica_job_id or revision.build_job_id
    if job_id:
        note(f"Its log: nabla jobs logs {job_id}")


def _model(deployment: Deployment) -> str:
    revision = deployment.revision
    return f"{revision.model_name}:{revision.model_version}" if revision else ""


def _say_state(deployment: Deployment) -> None:
    note(f"{deployment.state}{': ' if deployment.detail else ''}{deployment.detail}")
