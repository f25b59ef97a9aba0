"""nabla models"""

from __future__ import annotations

from pathlib import Path

import click

from nabla.cli.output import details, note, print_json, table, tell_left_out
from nabla.cli.progress import progress
from nabla.cli.projects import LIMIT
from nabla.cli.session import Group, Session, pass_session
from nabla.cli.values import named_version, numbers
from nabla.hints import readable_size
from nabla.objects import ModelVersion


@click.group(cls=Group)
def models() -> None:
    """The model repository: names, each with numbered versions that never change."""


@models.command("list", example="nabla models list --project digits")
@click.option("--project", default="", help="Only this project's.")
@LIMIT
@pass_session
def list_models(session: Session, project: str, limit: int) -> None:
    """List models with their newest version."""
    found = list(session.client().models.list(project, limit))
    if session.as_json:
        return print_json(found)
    newest = [(model, model.latest or ModelVersion()) for model in found]
    rows = [(m.id, m.name, m.latest_version, v.framework, _metrics(v), v.created_at) for m, v in newest]
    table(
        ("ID", "NAME", "NEWEST", "FRAMEWORK", "METRICS", "CREATED"),
        rows,
        "No models. `nabla models upload`, or nabla.save_model() in a job, makes one.",
    )


@models.command(example="nabla models get digits")
@click.argument("model")
@pass_session
def get(session: Session, model: str) -> None:
    """Show a model and all its versions."""
    found = session.client().models.get(model)
    if session.as_json:
        return print_json(found)
    details([("id", found.model.id), ("name", found.model.name), ("project", found.model.project_id)])
    rows = [
        (v.version, v.framework, readable_size(v.size_bytes), _metrics(v), v.job_id or "upload", v.created_at)
        for v in found.versions
    ]
    table(("VERSION", "FRAMEWORK", "SIZE", "METRICS", "FROM", "CREATED"), rows, "It has no version.")


@models.command(example="nabla models upload model.joblib --name digits --framework sklearn --project digits")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--name", required=True, help="The model's name; a new version is added when it exists.")
@click.option("--framework", required=True, help="What loads it: sklearn, torch, onnx, ...")
@click.option("--project", default="", help="The project's name or id; this folder's when left out.")
@click.option("--description", default="")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=NUMBER", help="May be repeated.")
@pass_session
def upload(
    session: Session,
    path: Path,
    name: str,
    framework: str,
    project: str,
    description: str,
    metrics: tuple[str, ...],
) -> None:
    """Upload a file or folder as the next version of a model."""
    from nabla.cli.project_choice import choose_project
    from nabla.manifest import describe

    values = numbers(metrics, "--metric")
    client = session.client(60.0)
    chosen = choose_project(client, project, Path.cwd())
    with progress() as stages:
        manifest = describe(path, stages)
    tell_left_out(manifest.left_out, "Left out (links to folders, which are not followed)")
    with progress() as stages:
        version = client.models.upload(
            manifest,
            name=name,
            framework=framework,
            project=chosen,
            description=description,
            metrics=values,
            stages=stages,
        )
    if session.as_json:
        return print_json(version)
    click.echo(f"{version.model_name}:{version.version}")
    note(f"Registered. Deploy it with `nabla deployments create {name} --model {name}:{version.version}`.")


@models.command(example="nabla models download digits:2 --to digits-2")
@click.argument("model", metavar="NAME[:VERSION]")
@click.option("--to", "folder", type=click.Path(path_type=Path, file_okay=False), default=None, help="A folder.")
@pass_session
def download(session: Session, model: str, folder: Path | None) -> None:
    """Download the files of a version, the newest when none is named."""
    name, number = named_version(model)
    folder = folder or Path(name)
    with progress() as stages:
        version, paths = session.client(60.0).models.download(name, folder, number, stages)
    if session.as_json:
        return print_json({"version": version, "paths": [str(path) for path in paths]})
    for path in paths:
        click.echo(path)
    note(f"{version.model_name}:{version.version} in {folder}.")


def _metrics(version: ModelVersion) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in sorted(version.metrics.items()))
