"""nabla contexts"""

from __future__ import annotations

import click

from nabla import contexts as resolution
from nabla import paths
from nabla.cli.output import note, print_json, table
from nabla.cli.session import Group, Session, pass_session
from nabla.contexts import Context, ContextBook
from nabla.errors import NoServer


@click.group(cls=Group)
def contexts() -> None:
    """Choose between saved servers."""


@contexts.command("list", example="nabla contexts list")
@pass_session
def list_contexts(session: Session) -> None:
    """List the servers this client knows; the one in force here is marked."""
    used = _in_force(session)
    known = list(ContextBook(paths.config_file()).all().values())
    if used is not None and used not in known:
        known.insert(0, used)
    if session.as_json:
        return print_json([_row(context, used) for context in known])
    rows = [("*" if context == used else "", context.name, context.url, context.source) for context in known]
    table(("", "NAME", "URL", "FROM"), rows, "None. Add one with `nabla login URL`.")


@contexts.command(example="nabla contexts use 127.0.0.1:7000")
@click.argument("name")
@pass_session
def use(session: Session, name: str) -> None:
    """Make a saved server the current one."""
    ContextBook(paths.config_file()).use(name)
    if session.as_json:
        return print_json({"current": name})
    note(f"Using {name!r}.")
    used = resolution.resolve()
    if used.name != name:
        note(f"Here {used.source} comes first ({used.url}): add --context {name}.")


@contexts.command(example="nabla contexts delete 127.0.0.1:7000")
@click.argument("name")
@pass_session
def delete(session: Session, name: str) -> None:
    """Forget a saved server and its token."""
    ContextBook(paths.config_file()).delete(name)
    if session.as_json:
        return print_json({"context": name, "deleted": True})
    note(f"Forgot {name!r}.")


def _in_force(session: Session) -> Context | None:
    try:
        return resolution.resolve(session.context_name)
    except NoServer:
        return None


def _row(context: Context, used: Context | None) -> dict[str, object]:
    return {"name": context.name, "url": context.url, "source": context.source, "in_force": context == used}
