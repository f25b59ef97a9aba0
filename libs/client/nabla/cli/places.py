"""Where a job's workspace comes from: a folder here, or a place that the node fetches it from itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, TypeVar

import click

from nabla.objects import Source

F = TypeVar("F", bound=Callable[..., object])

PLACE_OPTIONS = (
    click.option(
        "--workspace",
        default="",
        metavar="FOLDER|git+https://...|s3://...",
        help="What the job works in, in place of this folder: another one, a git repository, or an archive (tar, "
        "tar.gz, zip) in a bucket.",
    ),
    click.option("--ref", default="", help="Of git: a commit, tag or branch."),
    click.option("--endpoint", default="", metavar="URL", help="Of S3: the server; Amazon's when left out."),
    click.option("--workspace-username", default="", metavar="NAME", help="User or access key; may be secret:NAME."),
    click.option(
        "--workspace-password",
        default="",
        envvar="NABLA_WORKSPACE_PASSWORD",
        metavar="secret:NAME",
        help="Password, token or secret key. Anything but secret:NAME can be read by all who see the job.",
    ),
)


@dataclass(frozen=True)
class Place:
    """A folder of this machine, or a source, or neither: an empty workspace."""

    folder: Path | None
    source: Source


@dataclass(frozen=True)
class Said:
    """What the command line said of it."""

    workspace: str
    ref: str
    endpoint: str
    username: str
    password: str
    no_workspace: bool


def place_of(said: Said, here: Path) -> Place:
    """Raises UsageError where the options contradict each other."""
    kind = _kind(said.workspace)
    if said.no_workspace and said.workspace:
        raise click.UsageError("--workspace and --no-workspace contradict each other.")
    for name, value, kinds in (
        ("--ref", said.ref, ("git",)),
        ("--endpoint", said.endpoint, ("s3",)),
        ("--workspace-username", said.username, ("git", "s3")),
        ("--workspace-password", said.password, ("git", "s3")),
    ):
        if value and kind not in kinds and not (name == "--workspace-password" and not said.workspace):
            wanted = " or ".join("git+https://..." if each == "git" else "s3://..." for each in kinds)
            raise click.UsageError(f"{name} belongs to --workspace {wanted}.")
    if said.no_workspace:
        return Place(None, Source())
    if not kind:
        return Place(here / said.workspace if said.workspace else here, Source())
    url = said.workspace[len("git+") :] if kind == "git" else said.workspace
    return Place(None, Source(kind, url, said.ref, said.username, said.password, said.endpoint))


def _kind(workspace: str) -> str:
    if workspace.startswith("git+"):
        return "git"
    if workspace.startswith("s3://"):
        return "s3"
    if "://" in workspace:
        raise click.UsageError(
            f"--workspace {workspace}: write git+https://... for a repository, s3://... for a bucket."
        )
    return ""
