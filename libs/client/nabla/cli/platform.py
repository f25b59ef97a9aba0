"""nabla up, down, status"""

from __future__ import annotations

import importlib.util
import sys

import click

from nabla.cli.output import details, print_json, span, table
from nabla.cli.session import Command, Session, pass_session
from nabla.errors import NablaError
from nabla.hints import readable_size
from nabla.objects import Node, Status

PASSED_ON = {"ignore_unknown_options": True, "help_option_names": []}


class Delegated(click.Command):
    """Its options are the platform's, so all of them go through as they are, --help too."""


@click.command(cls=Delegated, context_settings=PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def up(arguments: tuple[str, ...]) -> int:
    """Start the platform on this machine. Example: nabla up"""
    return delegate("up", arguments)


@click.command(cls=Delegated, context_settings=PASSED_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def down(arguments: tuple[str, ...]) -> int:
    """Stop the platform on this machine. Its data stay. Example: nabla down"""
    return delegate("down", arguments)


@click.command(cls=Command, example="nabla status")
@pass_session
def status(session: Session) -> None:
    """Show services, nodes and how jobs are isolated."""
    client = session.client(5.0)
    found = client.status()
    if session.as_json:
        return print_json(found)
    details([("server", client.context.url), ("version", found.version), ("isolation", found.isolation)])
    if found.isolation_detail:
        click.echo(found.isolation_detail)
    click.echo()
    services = [(s.name, _word(s.ready), s.version, span(s.uptime_s), s.detail) for s in found.services]
    table(("SERVICE", "STATE", "VERSION", "UP", "DETAIL"), services, "No service answers.")
    click.echo()
    table(("NODE", "STATE", "CPUS", "MEMORY", "GPUS", "ISOLATION"), map(node_row, found.nodes), _no_nodes(found))


def delegate(command: str, arguments: tuple[str, ...]) -> int:
    """Runs the platform's own command in the interpreter it is installed in, which is this one or none."""
    if importlib.util.find_spec("services") is None:
        raise NablaError(
            f"`nabla {command}` works only where the platform is installed; this is the client alone.",
            "Run it in the platform's checkout (`make up`), or sign in to a server with `nabla login URL`.",
        )
    import subprocess

    process = subprocess.Popen([sys.executable, "-m", "services", command, *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # it was sent to the platform too, which ends in its own order
            continue


def node_row(node: Node) -> tuple[object, ...]:
    gpus = f"{node.gpu_count:g} {node.gpu_model}".strip() if node.gpu_count else "none"
    memory = readable_size(node.memory_bytes)
    return node.hostname or node.id, node.state, node.cpu_count, memory, gpus, node.isolation


def _no_nodes(status: Status) -> str:
    return f"No node yet: {status.nodes_detail or 'none has reported'}. Jobs wait until there is one."


def _word(ready: bool) -> str:
    return "ready" if ready else "not ready"
