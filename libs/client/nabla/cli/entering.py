"""nabla jobs exec, shell and open: other ways into a running job than `nabla ssh`."""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import TYPE_CHECKING

import click

from nabla.cli.output import note
from nabla.cli.session import Command, Session, pass_session
from nabla.errors import NablaError

if TYPE_CHECKING:
    import socket

    from nabla.client import Client
    from nabla.tunnel import Tunnel

UNPROCESSED = {"ignore_unknown_options": True, "allow_interspersed_args": False}
RANK = click.option("--rank", type=click.IntRange(0), default=0, help="Of a job of several processes: which.")


@click.command("exec", cls=Command, context_settings=UNPROCESSED, example="nabla jobs exec js01jabc -- nvidia-smi")
@RANK
@click.option("--tty", "-t", is_flag=True, help="With a terminal, for programs that want one.")
@click.argument("job")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, required=True)
@pass_session
def exec_(session: Session, rank: int, tty: bool, job: str, words: tuple[str, ...]) -> int:
    """Run a command in a running job, as the job's own user. The exit code is the command's."""
    from nabla.cli.ssh import run_ssh, without_dashes

    given = without_dashes(words)
    command = given[0] if len(given) == 1 else shlex.join(given)
    return run_ssh(session, job, rank, [command], ["-tt" if tty else "-T"])


@click.command("shell", cls=Command, example="nabla jobs shell js01jabc")
@RANK
@click.argument("job")
@pass_session
def shell(session: Session, rank: int, job: str) -> int:
    """Open a shell in a running job."""
    from nabla.cli.ssh import run_ssh

    return run_ssh(session, job, rank, [], ["-t"])


@click.command(
    "open",
    cls=Command,
    example=("nabla jobs open js01jabc --port 8000", "nabla jobs open js01jabc --port 6006 --local 0"),
)
@click.option("--port", type=click.IntRange(1, 65_535), required=True, help="On which the job listens, on 127.0.0.1.")
@click.option(
    "--local",
    type=click.IntRange(0, 65_535),
    help="The port on this machine; the same when left out, 0 for a free one.",
)
@RANK
@click.argument("job")
@pass_session
def open_port(session: Session, port: int, local: int | None, rank: int, job: str) -> int:
    """Bring a port of a running job to this machine, until Ctrl-C."""
    import threading

    client = session.client()
    # Refused at once, and not with the first connection.
    client.jobs.open_door(job, "tcp", port=port, rank=rank)
    with _listening(port if local is None else local) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        if session.as_json:
            from nabla.cli.output import print_json

            print_json({"address": address, "job": job, "port": port})
        else:
            click.echo(f"http://{address}")
            note(f"Port {port} of job {job}, until Ctrl-C.")
        sys.stdout.flush()
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, job, port, rank, connection), daemon=True).start()


def _listening(port: int) -> socket.socket:
    import socket

    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise NablaError(
            f"Port {port} of this machine cannot be used: {error.strerror or error}.",
            "Choose another with --local, or --local 0.",
        ) from error


def _serve(client: Client, job: str, port: int, rank: int, connection: socket.socket) -> None:
    import threading

    with connection:
        try:
            tunnel = client.jobs.enter(client.jobs.open_door(job, "tcp", port=port, rank=rank))
        except NablaError as error:
            note(str(error))
            return
        threading.Thread(target=_send, args=(connection, tunnel), daemon=True).start()
        with contextlib.suppress(OSError):
            while data := tunnel.read():
                connection.sendall(data)
        tunnel.close()


def _send(connection: socket.socket, tunnel: Tunnel) -> None:
    with contextlib.suppress(OSError):
        while data := connection.recv(1 << 16):
            tunnel.write(data)
        tunnel.finish_writing()
