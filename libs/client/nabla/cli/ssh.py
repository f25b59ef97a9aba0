"""nabla ssh: OpenSSH's own client, led into a running job through the front door.

What OpenSSH does it does here as well: terminals, exit codes, scp, rsync, forwarding, editors that work remotely.
`nabla ssh --proxy` is its ProxyCommand: it asks for a ticket, and carries bytes from then on.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from nabla import paths
from nabla.cli.session import Command, Session, pass_session
from nabla.errors import NablaError

DOMAIN = ".nabla"
USER = "nabla"
SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@click.command(
    cls=Command,
    context_settings=SETTINGS,
    example=("nabla ssh js01jabc", "nabla ssh js01jabc -- nvidia-smi", "nabla ssh --config >> ~/.ssh/config"),
)
@click.option(
    "--config",
    "show_config",
    is_flag=True,
    help="Print the entry for ~/.ssh/config: `ssh JOB.nabla`, scp, rsync and editors then find jobs by themselves.",
)
@click.option("--proxy", is_flag=True, help="Carry standard input and output into the job: what the entry calls.")
@click.option("--rank", type=click.IntRange(0), default=0, help="Of a job of several processes: which.")
@click.argument("job", required=False, default="")
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@pass_session
def ssh(session: Session, show_config: bool, proxy: bool, rank: int, job: str, words: tuple[str, ...]) -> int:
    """Open a terminal in a running job, or run a command there; all further words are ssh's own."""
    if show_config:
        click.echo("\n".join([f"Host *{DOMAIN}", *(f"    {name} {value}" for name, value in entry(session))]))
        return 0
    if not job:
        raise click.UsageError("Which job? `nabla jobs list --state running` shows them.")
    if proxy:
        return carry_into(session, job.removesuffix(DOMAIN), rank)
    return run_ssh(session, job, rank, without_dashes(words))


def without_dashes(words: Sequence[str]) -> Sequence[str]:
    """What follows `--`, which some write between a job and its command."""
    return words[1:] if words[:1] == ("--",) else words


def run_ssh(session: Session, job: str, rank: int, words: Sequence[str], options: Sequence[str] = ()) -> int:
    """ssh into the job. The answer is its exit code: the command's, or 255 for a connection that broke."""
    import subprocess

    program = shutil.which("ssh")
    if not program:
        raise NablaError(
            "There is no ssh on this machine.", "Install OpenSSH's client (Debian: apt-get install openssh-client)."
        )
    settings = [word for name, value in entry(session, rank) for word in ("-o", f"{name}={value}")]
    command = [program, "-F", "none", *settings, *options, f"{USER}@{job}{DOMAIN}", *words]
    return subprocess.run(command, check=False).returncode


def entry(session: Session, rank: int = 0) -> list[tuple[str, str]]:
    """ssh's settings for jobs, each with the value as its configuration file has it."""
    own = [sys.executable, "-m", "nabla"]
    context = ["--context", session.context_name] if session.context_name else []
    of_rank = ["--rank", str(rank)] if rank else []
    proxy = shlex.join([*own, "ssh", *context, "--proxy", *of_rank])
    return [
        ("User", USER),
        ("ProxyCommand", f"{proxy} %n"),
        ("IdentityFile", str(key_file())),
        ("IdentitiesOnly", "yes"),
        ("UserKnownHostsFile", str(folder() / "known_hosts")),
        ("StrictHostKeyChecking", "yes"),
        ("HostKeyAlgorithms", "ssh-ed25519"),
        ("LogLevel", "ERROR"),
    ]


def carry_into(session: Session, job: str, rank: int) -> int:
    from nabla.tunnel import carry

    client = session.client()
    public = key_file().with_suffix(".pub").read_text(encoding="utf-8").strip()
    door = client.jobs.open_door(job, "ssh", public_key=public, rank=rank)
    pin(f"{job}{DOMAIN}", door.host_key)
    carry(client.jobs.enter(door), sys.stdin.fileno(), sys.stdout.fileno())
    return 0


def folder() -> Path:
    place = paths.config_dir() / "ssh"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def key_file() -> Path:
    """This user's key for jobs, made when it is first needed; it opens nothing without a ticket."""
    import subprocess

    file = folder() / "id_ed25519"
    if not file.exists():
        maker = shutil.which("ssh-keygen")
        if not maker:
            raise NablaError(
                "There is no ssh-keygen on this machine.",
                "Install OpenSSH's client (Debian: apt-get install openssh-client).",
            )
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        subprocess.run([maker, "-q", "-t", "ed25519", "-N", "", "-C", "nabla", "-f", str(draft)], check=True)
        draft.with_name(f"{draft.name}.pub").replace(file.with_suffix(".pub"))
        draft.replace(file)
    return file


def pin(host: str, key: str) -> None:
    """The one key that this host may have, known before ssh asks for it."""
    file = folder() / "known_hosts"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    kept = [line for line in lines if line.split(" ", 1)[0] != host]
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text("\n".join([*kept[-1000:], f"{host} {key}", ""]), encoding="utf-8")
    draft.replace(file)
