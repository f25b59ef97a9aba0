"""nabla projects"""

from __future__ import annotations

import click

from nabla.cli.output import details, note, print_json, table
from nabla.cli.session import Group, Session, pass_session
from nabla.objects import Project

LIMIT = click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")


@click.group(cls=Group)
def projects() -> None:
    """Create and manage projects. A project is named by its name or its id."""


@projects.command(example="nabla projects create digits --description 'Handwritten digits'")
@click.argument("name")
@click.option("--description", default="", help="What it is for.")
@pass_session
def create(session: Session, name: str, description: str) -> None:
    """Create a project."""
    _say(session, session.client().projects.create(name, description), "Created")


@projects.command("list", example="nabla projects list --state any")
@click.option("--state", type=click.Choice(["active", "archived", "deleted", "any"]), default="active")
@LIMIT
@pass_session
def list_projects(session: Session, state: str, limit: int) -> None:
    """List projects."""
    found = list(session.client().projects.list(state, limit))
    if session.as_json:
        return print_json(found)
    rows = [(p.id, p.name, p.state, p.description, p.created_at) for p in found]
    table(
        ("ID", "NAME", "STATE", "DESCRIPTION", "CREATED"),
        rows,
        "No projects. Create one with `nabla projects create NAME`.",
    )


@projects.command(example="nabla projects get digits")
@click.argument("project")
@pass_session
def get(session: Session, project: str) -> None:
    """Show a project."""
    _show(session, session.client().projects.get(project))


@projects.command(example="nabla projects update digits --name digits-2026")
@click.argument("project")
@click.option("--name", help="A new name.")
@click.option("--description", help="A new description.")
@pass_session
def update(session: Session, project: str, name: str | None, description: str | None) -> None:
    """Change a project's name or description."""
    if name is None and description is None:
        raise click.UsageError("Nothing to change: give --name or --description.")
    _say(session, session.client().projects.update(project, name, description), "Updated")


@projects.command(example="nabla projects archive digits")
@click.argument("project")
@pass_session
def archive(session: Session, project: str) -> None:
    """Archive a project: it can be read, and nothing new starts in it."""
    _say(session, session.client().projects.archive(project), "Archived")


@projects.command(example="nabla projects delete digits")
@click.argument("project")
@pass_session
def delete(session: Session, project: str) -> None:
    """Delete a project. `restore` takes it back for some days."""
    _say(session, session.client().projects.delete(project), "Deleted")


@projects.command(example="nabla projects restore digits")
@click.argument("project")
@pass_session
def restore(session: Session, project: str) -> None:
    """Take a project back from the archive, or from deletion."""
    _say(session, session.client().projects.restore(project), "Restored")


@projects.command(example="nabla projects move digits --team tm01jabc")
@click.argument("project")
@click.option("--team", required=True, help="The team's id.")
@pass_session
def move(session: Session, project: str, team: str) -> None:
    """Give a project to another team."""
    _say(session, session.client().projects.move(project, team), "Moved")


def _say(session: Session, project: Project, done: str) -> None:
    if session.as_json:
        print_json(project)
    else:
        click.echo(project.id)
        note(f"{done} project {project.name!r}.")


def _show(session: Session, project: Project) -> None:
    if session.as_json:
        return print_json(project)
    details(
        [
            ("id", project.id),
            ("name", project.name),
            ("state", project.state),
            ("description", project.description),
            ("team", project.team_id),
            ("created by", project.created_by),
            ("created", project.created_at),
        ]
    )
