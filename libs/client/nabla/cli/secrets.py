"""nabla secrets"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nabla.cli.output import note, print_json, table
from nabla.cli.session import Group, Session, pass_session
from nabla.errors import NablaError

if TYPE_CHECKING:
    from nabla.client import Client
    from nabla.objects import Job, Secret

PROJECT = click.option("--project", default="", help="Of this project alone, by name or id; the whole team's without.")
NOT_STARTED = ("submitted", "waiting", "queued")
# Of each state, of which a word is said after a deletion.
LOOKED_AT = 200
NAMED = 5


@click.group(cls=Group)
def secrets() -> None:
    """Keep passwords and tokens for jobs. Nobody reads them again: a job gets one by --env KEY=secret:NAME.

    A text that begins with "secret:" itself is written --env KEY=secret::TEXT.
    """


@secrets.command(
    "set", example=("nabla secrets set HF_TOKEN", "nabla secrets set DB --project digits --from-file pw.txt")
)
@click.argument("name")
@PROJECT
@click.option("--from-file", "source", metavar="FILE", help="Take the file's content as it is; - is standard input.")
@pass_session
def set_secret(session: Session, name: str, project: str, source: str | None) -> None:
    """Set a secret. Its value is asked for, or read from standard input or a file: never from the command line."""
    if "=" in name:
        raise click.UsageError(
            f"A value on the command line can be read by everybody on this machine, and stays in the shell's history. "
            f"Write `nabla secrets set {name.partition('=')[0]}`: the value is asked for."
        )
    made = session.client().secrets.set(name, read_value(name, source), project)
    if session.as_json:
        return print_json(made)
    note(f"Set {name} of {owner_of(made)}, version {made.version}. A job gets it by --env KEY=secret:{name}.")


@secrets.command("list", example="nabla secrets list --project digits")
@PROJECT
@pass_session
def list_secrets(session: Session, project: str) -> None:
    """List secrets by name: the team's and, with --project, that project's. Their values are not shown."""
    found = list(session.client().secrets.list(project))
    if session.as_json:
        return print_json(found)
    rows = [(s.name, owner_of(s), s.version, s.updated_by, s.updated_at) for s in found]
    table(("NAME", "OF", "VERSION", "SET BY", "SET"), rows, "No secrets. Set one with `nabla secrets set NAME`.")


@secrets.command(example="nabla secrets delete HF_TOKEN")
@click.argument("name")
@PROJECT
@pass_session
def delete(session: Session, name: str, project: str) -> None:
    """Delete a secret. Jobs that have started keep it; those that start later and name it fail."""
    client = session.client()
    deleted = client.secrets.delete(name, project)
    if session.as_json:
        return print_json(deleted)
    note(f"Deleted {name} of {owner_of(deleted)}.")
    left = jobs_that_name(client, name, deleted.project_id)
    if left:
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        named = ", ".join(job.id for job in left[:NAMED])
        note(f"Jobs that have not started and name it will fail, unless another of this name is left: {named}{more}.")


@secrets.command("rotate-key", example="nabla secrets rotate-key")
def rotate_key() -> int:
    """Make a new key for all secrets of the installation on this machine. Their values stay as they are."""
    from nabla.cli.platform import delegate

    return delegate("rotate-secrets-key", ())


def owner_of(secret: Secret) -> str:
    return f"project {secret.project_id}" if secret.project_id else "the team"


def read_value(name: str, source: str | None) -> str:
    """The value: of a file as it is; from standard input or the terminal without the line's end."""
    if source and source != "-":
        try:
            return _text(Path(source).read_bytes(), source)
        except OSError as error:
            raise NablaError(f"Cannot read {source}: {error.strerror}.", "Give a file that you can read.") from error
    if source == "-" or not sys.stdin.isatty():
        return _without_end(_text(sys.stdin.buffer.read(), "standard input"))
    typed: str = click.prompt(f"Value of {name} (not shown)", hide_input=True, err=True)
    return typed


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        message = f"What {where} holds is not text, and a variable holds nothing else."
        raise NablaError(message, "Set it as base64, and decode it in the job.") from None


def _without_end(text: str) -> str:
    """`echo` and editors end a line that belongs to no password."""
    return text[:-2] if text.endswith("\r\n") else text[:-1] if text.endswith("\n") else text


def jobs_that_name(client: Client, name: str, project_id: str) -> list[Job]:
    """Those of the newest that wait to start."""
    waiting = (job for state in NOT_STARTED for job in client.jobs.list(project_id, state, limit=LOOKED_AT))
    return [job for job in waiting if names(job, f"secret:{name}")]


def names(job: Job, reference: str) -> bool:
    template = job.template
    env, containers = [template.env], [template.container]
    for role in template.gang.roles:
        env.append(role.env)
        containers.append(role.container)
    values = [value for variables in env for value in variables.values()]
    values += [value for each in containers for value in (each.registry_username, each.registry_password)]
    return reference in (*values, template.source.username, template.source.password)
