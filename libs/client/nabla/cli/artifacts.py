"""nabla artifacts"""

from __future__ import annotations

from pathlib import Path

import click

from nabla.cli.output import note, print_json, table
from nabla.cli.progress import progress
from nabla.cli.session import Group, Session, pass_session
from nabla.hints import readable_size


@click.group(cls=Group)
def artifacts() -> None:
    """What a job wrote to $NABLA_ARTIFACTS, kept when it ended."""


@artifacts.command("list", example="nabla artifacts list js01jabc")
@click.argument("job")
@pass_session
def list_artifacts(session: Session, job: str) -> None:
    """List the files a job left behind."""
    files = list(session.client().jobs.artifacts(job))
    if session.as_json:
        return print_json(files)
    rows = [(file.path, readable_size(file.size_bytes), file.sha256[:12]) for file in files]
    table(("PATH", "SIZE", "SHA256"), rows, "No artifacts; they appear when the job has ended.")


@artifacts.command(example="nabla artifacts download js01jabc --to results")
@click.argument("job")
@click.option("--to", "folder", type=click.Path(path_type=Path, file_okay=False), default=None, help="A folder.")
@pass_session
def download(session: Session, job: str, folder: Path | None) -> None:
    """Download them into a folder named after the job, or into --to. What is there already is not fetched again."""
    folder = folder or Path(job)
    with progress() as stages:
        paths = session.client(60.0).jobs.download_artifacts(job, folder, stages)
    if session.as_json:
        return print_json([str(path) for path in paths])
    for path in paths:
        click.echo(path)
    note(f"{len(paths)} files in {folder}." if paths else "No artifacts; they appear when the job has ended.")
