"""nabla nodes, nabla node"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from nabla.cli.output import details, note, print_json, table
from nabla.cli.session import Group, Session, pass_session
from nabla.errors import NablaError
from nabla.hints import readable_size
from nabla.objects import Node

HEADINGS = ("ID", "NODE", "STATE", "CPUS", "MEMORY", "GPUS", "ISOLATION", "RUNTIMES", "JOBS")
HOMES = ("/var/lib/nabla-node", "~/.nabla-node")


@click.group(cls=Group)
def nodes() -> None:
    """List nodes, and take them out of use."""


@nodes.command("list", example="nabla nodes list")
@pass_session
def list_nodes(session: Session) -> None:
    """List the machines that jobs run on, and what is used of them."""
    page = session.client().nodes.page()
    if session.as_json:
        return print_json(page.items)
    why = page.detail or "none has reported"
    table(HEADINGS, map(node_row, page.items), f"No node yet: {why}. Jobs wait until there is one.")


@nodes.command(example="nabla nodes get gpu-box")
@click.argument("node")
@pass_session
def get(session: Session, node: str) -> None:
    """Show one node, by id or host name."""
    found = session.client().nodes.get(node)
    if session.as_json:
        return print_json(found)
    details(
        [
            ("id", found.id),
            ("hostname", found.hostname),
            ("address", found.address),
            ("state", told_state(found)),
            ("cpus", used_of(found.cpu_used, found.cpu_count)),
            ("memory", _memory(found)),
            ("gpus", _gpus(found)),
            ("isolation", found.isolation),
            ("isolation detail", found.isolation_detail),
            ("runtimes", ", ".join(found.runtimes)),
            ("network", found.network),
            ("attempts", found.attempt_count),
            ("your jobs", ", ".join(found.job_ids)),
            ("seen", found.seen_at),
        ]
    )


@nodes.command(example="nabla nodes drain gpu-box")
@click.argument("node")
@click.option("--undo", is_flag=True, help="Use it again.")
@pass_session
def drain(session: Session, node: str, undo: bool) -> None:
    """Give a node no new work. What runs there finishes; then it rests and can be taken away."""
    client = session.client()
    found = client.nodes.undrain(node) if undo else client.nodes.drain(node)
    if session.as_json:
        return print_json(found)
    name = found.hostname or found.id
    note(
        f"{name} is used again." if undo else f"{name} takes no new work. `nabla nodes get {name}` shows when it rests."
    )


@click.group(cls=Group)
def node() -> None:
    """Make machines nodes, and take this one off again."""


@node.command(example="nabla node token")
@pass_session
def token(session: Session) -> None:
    """Print the one command that makes a second machine a node. It is good once, for an hour."""
    made = session.client().nodes.invite()
    if session.as_json:
        return print_json(made)
    click.echo(made.command)
    note(f"Run it on the machine, which needs Python {made.python_version}. It is good once, until {made.expires_at}.")


@node.command(example="nabla node leave")
@click.option("--home", default="", help="The node's folder, where it is not the default.")
@click.option("--now", is_flag=True, help="End the jobs that run here.")
def leave(home: str, now: bool) -> int:
    """Take this machine off its cluster. Run it on the node itself."""
    folder = next((each for each in _homes(home) if (each / "node.json").exists()), None)
    if folder is None:
        raise NablaError(
            "This machine is no node: there is no node.json in " + " or ".join(map(str, _homes(home))) + ".",
            "Name the folder with --home; a machine that runs `nabla up` is left with `nabla down`.",
        )
    python = json.loads((folder / "node.json").read_text(encoding="utf-8"))["python"]
    import subprocess

    program = str(folder / "code" / "infra" / "node" / "node.py")
    return subprocess.call([python, program, "leave", str(folder), *(["--now"] if now else [])])


def _homes(given: str) -> list[Path]:
    return [Path(os.path.expanduser(home)) for home in ([given] if given else HOMES)]


def node_row(node: Node) -> tuple[object, ...]:
    runtimes = ", ".join(node.runtimes)
    cpus = used_of(node.cpu_used, node.cpu_count)
    name, jobs = node.hostname or node.address, str(node.attempt_count)
    return node.id[:12], name, told_state(node), cpus, _memory(node), _gpus(node), node.isolation, runtimes, jobs


def told_state(node: Node) -> str:
    return f"{node.state}, draining" if node.draining and node.state != "resting" else node.state


def used_of(used: float, total: float) -> str:
    return f"{used:g} of {total:g}"


def _memory(node: Node) -> str:
    return f"{readable_size(node.memory_used_bytes)} of {readable_size(node.memory_bytes)}"


def _gpus(node: Node) -> str:
    if not node.gpu_count:
        return "none"
    size = f" {readable_size(node.gpu_memory_bytes)}" if node.gpu_memory_bytes else ""
    return f"{used_of(node.gpu_used, node.gpu_count)} {node.gpu_model}{size}".strip()
