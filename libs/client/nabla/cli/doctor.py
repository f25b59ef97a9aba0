"""nabla doctor: looks at everything between this terminal and a running job."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nabla import __version__, contexts, paths
from nabla.cli.output import print_json
from nabla.cli.session import Command, Session, pass_session
from nabla.errors import NablaError, Unavailable, Unreachable
from nabla.hints import readable_size
from nabla.objects import Status
from nabla.record import Record

if TYPE_CHECKING:
    from nabla.client import Client

CLOCK_TOLERANCE_S = 30.0
DISK_NEEDED_BYTES = 2 << 30
OK, WARNING, BAD = "ok", "warning", "bad"
MARKS = {OK: ("ok  ", "green"), WARNING: ("warn", "yellow"), BAD: ("BAD ", "red")}


class Check(Record):
    """One finding; `remedy` is empty when all is well."""

    name: str = ""
    verdict: str = OK
    detail: str = ""
    remedy: str = ""


@click.command(cls=Command, example="nabla doctor")
@pass_session
def doctor(session: Session) -> int:
    """Check client, server, token, clock, isolation, services, nodes and disk. Exit code 1 when something is bad."""
    checks = []
    for check in examine(session):
        checks.append(check)
        if not session.as_json:
            _show(check)
    if session.as_json:
        print_json(checks)
    return int(any(check.verdict == BAD for check in checks))


def examine(session: Session) -> Iterator[Check]:
    """One check after the other; those that need an answer end with the first that gets none."""
    yield Check("client", OK, f"nabla {__version__}")
    yield from disk(session.context_name)
    try:
        client = session.client(3.0)
        context = client.context
        yield Check("context", OK, f"{context.url} (from {context.source})")
        yield clock(client)
        principal = client.whoami()
        yield Check("token", OK, f"valid for {principal.name or principal.id}, role {principal.role or 'none'}")
        status = client.status()
    except (Unreachable, Unavailable) as error:
        yield Check("server", BAD, str(error), error.remedy)
    except NablaError as error:
        yield Check("access", BAD, str(error), error.remedy or "Sign in again with `nabla login URL`.")
    else:
        yield version(status)
        yield isolation(status)
        yield from services(status)
        yield from nodes(status)


def clock(client: Client) -> Check:
    """Signed URLs and tokens expire by the clock, so both sides must agree on it."""
    server = client.server_time()
    ahead_s = 0.0 if server is None else time.time() - server
    if abs(ahead_s) > CLOCK_TOLERANCE_S:
        return Check("clock", BAD, f"{ahead_s:+.0f} s against the server", "Set both clocks by NTP.")
    return Check("server", OK, "answers, and its clock agrees")


def version(status: Status) -> Check:
    """They are released together; the same minor version is known to work."""
    if status.version.split(".")[:2] == __version__.split(".")[:2]:
        return Check("version", OK, f"server {status.version}")
    return Check(
        "version",
        WARNING,
        f"server {status.version}, client {__version__}",
        "Install the server's version of the client.",
    )


# What stands between jobs and their node, for each class that has walls at all.
WALLS = {
    "bwrap": "jobs run in sandboxes of their own",
    "podman": "jobs run in containers of their own",
}


def isolation(status: Status) -> Check:
    """What every job may count on; those with an image have its walls besides, where a node can run images."""
    images = sorted({runtime for node in status.nodes for runtime in node.runtimes})
    with_image = f"; with an image: {' or '.join(f'{name} ({WALLS.get(name, name)})' for name in images)}"
    told = with_image if images else ""
    if status.isolation in WALLS:
        return Check("isolation", OK, f"{status.isolation}: {WALLS[status.isolation]}{told}")
    if not status.isolation:
        return Check("isolation", WARNING, "unknown: no node has said it yet", "See `nabla status`.")
    without = " without an image" if images else ""
    detail = f"{status.isolation}: jobs{without} are not sandboxed{told}"
    return Check("isolation", WARNING, detail, status.isolation_detail or "See `nabla up`.")


def services(status: Status) -> Iterator[Check]:
    for service in status.services:
        verdict = OK if service.ready else BAD
        detail = service.detail or ("ready" if service.ready else "not ready")
        yield Check(service.name, verdict, detail, "" if service.ready else "`nabla up` starts what is missing.")
        if service.dead_letters:
            yield Check(service.name, WARNING, f"{service.dead_letters} messages could not be handled", "See its log.")


def nodes(status: Status) -> Iterator[Check]:
    if not status.nodes:
        detail = status.nodes_detail or "no node has reported yet"
        yield Check("nodes", BAD, detail, "Ray may take a minute after `nabla up`; jobs wait until then.")
    for node in status.nodes:
        verdict = OK if node.state == "ready" else BAD
        memory = readable_size(node.memory_bytes)
        detail = f"{node.state}, {node.cpu_count:g} CPUs, {memory}, {node.gpu_count:g} GPUs"
        remedy = "" if verdict == OK else "Is the machine up and connected?"
        yield Check(f"node {node.hostname}", verdict, detail, remedy)


def disk(context_name: str | None) -> Iterator[Check]:
    """The installation's data folder when it is on this machine, and the client's own cache."""
    for name, folder in _folders(context_name):
        free = shutil.disk_usage(_existing(folder)).free
        verdict = OK if free >= DISK_NEEDED_BYTES else BAD
        remedy = "" if verdict == OK else f"Free some space: at least {readable_size(DISK_NEEDED_BYTES)} are needed."
        yield Check(name, verdict, f"{readable_size(free)} free at {folder}", remedy)


def _folders(context_name: str | None) -> Iterator[tuple[str, Path]]:
    with contextlib.suppress(NablaError):  # which is said where the context itself is looked at
        context = contexts.resolve(context_name)
        if context.installed_here:
            yield "disk", Path(context.source).parent
    with contextlib.suppress(paths.NoHome):
        yield "disk (cache)", paths.cache_dir()


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _show(check: Check) -> None:
    mark, colour = MARKS[check.verdict]
    click.echo(f"{click.style(mark, fg=colour)}  {check.name}: {check.detail}")
    if check.remedy:
        click.echo(f"      -> {check.remedy}")
