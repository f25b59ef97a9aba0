"""From a command line to a submitted job: project, workspace, environment, template. `nabla run` and
`nabla experiments run singlenode` are the same thing under two names."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Callable, TypeVar

import click

from nabla import paths
from nabla.cli import environment
from nabla.cli.follow import follow
from nabla.cli.images import CONTAINER_OPTIONS, ImageSaid, container_of
from nabla.cli.output import note, print_json, tell_left_out
from nabla.cli.places import PLACE_OPTIONS, Said, place_of
from nabla.cli.progress import progress
from nabla.cli.project_choice import choose_project
from nabla.cli.session import Session
from nabla.cli.values import size, span
from nabla.hints import readable_size
from nabla.objects import Environment, Experiment, Gang, JobTemplate, ModelOutput, Resources, Retry
from nabla.paths import NoHome

if TYPE_CHECKING:
    from nabla.client import Client
    from nabla.packing import Workspace

ASK_ABOVE_BYTES = 1 << 30
ASK_ABOVE_FILES = 50_000
ALONE = Gang()
F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    command: tuple[str, ...]
    project: str
    name: str
    env: tuple[str, ...]
    cpus: float
    memory: int
    gpus: float
    timeout: float
    retries: int
    machine_type: str
    gpu_model: str
    gpu_memory: int
    priority: int | None
    max_wait: float
    retry_on: tuple[str, ...]
    retry_delay: float
    network: str | None
    container: str
    dockerfile: str
    build_args: tuple[str, ...]
    container_user: str
    registry_username: str
    registry_password: str
    models: tuple[str, ...]
    requirements: str
    python: str
    workspace: str
    ref: str
    endpoint: str
    workspace_username: str
    workspace_password: str
    no_workspace: bool
    detach: bool
    yes: bool


def submission_options(function: F, *, command_required: bool = True) -> F:
    """The options of a submission, in the order in which help shows them."""
    argument = click.argument("command", nargs=-1, type=click.UNPROCESSED, required=command_required)
    for option in reversed((*_OPTIONS, argument)):
        function = option(function)
    return function


_OPTIONS = (
    click.option("--project", default="", help="Name or id; when left out, this folder's, made if need be."),
    click.option("--name", default="", help="A name for people; taken from the command when left out."),
    click.option(
        "--env",
        multiple=True,
        metavar="KEY=VALUE|ENVIRONMENT",
        help="A variable for the job, whose VALUE may be secret:NAME (see `nabla secrets`); or where its python comes "
        "from: active (this terminal's virtualenv or conda environment), default (the platform's), or a requirements "
        "FILE. May be repeated.",
    ),
    click.option("--cpus", type=click.FloatRange(0), default=0.0, help="CPU cores."),
    click.option("--memory", type=size, default="0", metavar="SIZE", help="Memory, such as 4G."),
    click.option("--gpus", type=click.FloatRange(0), default=0.0, help="GPUs; less than 1 is a share of one."),
    click.option("--gpu-model", default="", metavar="MODEL", help="Only on such GPUs, such as H100."),
    click.option("--gpu-memory", type=size, default="0", metavar="SIZE", help="The least memory of each GPU, as 40G."),
    click.option(
        "--machine-type",
        "--machine",
        "machine_type",
        default="",
        metavar="TYPE",
        help="What the options above leave open; see `nabla machines`.",
    ),
    click.option("--priority", type=click.IntRange(0, 100), help="The higher first; 50 when left out."),
    click.option("--max-wait", type=span, default="0", metavar="TIME", help="Give up when no machine is free so long."),
    click.option("--timeout", type=span, default="0", metavar="TIME", help="Stop it after so long, such as 2h."),
    click.option("--retries", type=click.IntRange(0), default=0, help="Try again so often when it fails."),
    *CONTAINER_OPTIONS,
    click.option(
        "--retry-on",
        multiple=True,
        metavar="CAUSE",
        help="Try again only after failure, exit:N, out_of_memory, node_lost, start_failure or timed_out. May be "
        "repeated; failure, node_lost and start_failure when left out.",
    ),
    click.option(
        "--retry-delay", type=span, default="0", metavar="TIME", help="Before the first retry; doubled with each more."
    ),
    click.option(
        "--network",
        type=click.Choice(["none", "platform", "internet"]),
        help="How far the job reaches: nowhere; the platform and the job's own other nodes; or public addresses too.",
    ),
    click.option(
        "--model",
        "models",
        multiple=True,
        metavar="NAME=PATH[:FRAMEWORK]",
        help="Register this folder or file of $NABLA_ARTIFACTS as a model when the job succeeds. May be repeated.",
    ),
    *environment.ENVIRONMENT_OPTIONS,
    *PLACE_OPTIONS,
    click.option("--no-workspace", is_flag=True, help="Send no folder along."),
    click.option("--detach", is_flag=True, help="Print the job's id and return at once."),
    click.option("--yes", is_flag=True, help="Answer questions with yes."),
)


def submit_and_follow(session: Session, options: Options, folder: Path, gang: Gang = ALONE) -> int:
    """Everything `nabla run` does; a gang's processes are told apart in the log. The answer is the exit code."""
    env, models = environment.parse(options.env), tuple(map(model_output, options.models))
    container = container_of(_image_said(options), env.choice)
    if container.dockerfile and options.no_workspace:
        raise click.UsageError("--dockerfile names a file of the workspace: leave out --no-workspace.")
    place = place_of(_said(options), folder)
    if place.folder:
        confirm_place(place.folder, options.yes)
    client = session.client(60.0)
    wish = environment.Wish(env.choice, options.requirements, options.python)
    python = Environment() if container.image or container.dockerfile else environment.choose(wish, client, place)
    project = choose_project(client, options.project, folder)
    workspace_id, origin = "", {"folder": folder.name}
    if place.folder:
        workspace_id, origin = send_workspace(client, project, place.folder, options.yes)
    elif place.source.kind:
        origin = {key: value for key, value in (("url", place.source.url), ("ref", place.source.ref)) if value}
    template = JobTemplate(
        name=options.name or name_of(options.command),
        command=options.command,
        env=env.variables,
        resources=resources_of(options),
        workspace_id=workspace_id,
        environment=python,
        source=place.source,
        container=container,
        timeout_s=options.timeout,
        max_retries=options.retries,
        priority=options.priority,
        machine_type=options.machine_type,
        max_wait_s=options.max_wait,
        retry=Retry(on=options.retry_on, delay_s=options.retry_delay),
        network=options.network or "",
        models=models,
        origin=origin,
        gang=gang,
    )
    try:
        experiment = client.experiments.start(project, template.name, template)
    except KeyboardInterrupt:
        note("\nThe job may have been submitted already: `nabla jobs list` shows it.")
        raise
    return _started(session, client, experiment, options.detach)


def resources_of(options: Options) -> Resources:
    return Resources(options.cpus, options.memory, options.gpus, options.gpu_model, options.gpu_memory)


def _image_said(options: Options) -> ImageSaid:
    return ImageSaid(
        options.container,
        options.dockerfile,
        options.build_args,
        options.container_user,
        options.registry_username,
        options.registry_password,
    )


def _said(options: Options) -> Said:
    return Said(
        options.workspace,
        options.ref,
        options.endpoint,
        options.workspace_username,
        options.workspace_password,
        options.no_workspace,
    )


def _started(session: Session, client: Client, experiment: Experiment, detach: bool) -> int:
    job = experiment.jobs[0]
    if not detach:
        note(f"Job {job.id} (Ctrl-C detaches, the job goes on).")
        return follow(session, client, job.id)
    if session.as_json:
        print_json(job)
    else:
        click.echo(job.id)
        note(f"Follow it with `nabla jobs attach {job.id}`.")
    return 0


def send_workspace(client: Client, project: str, folder: Path, yes: bool) -> tuple[str, dict[str, str]]:
    """The id of the sealed workspace and where it came from."""
    from nabla.packing import pack

    workspace = pack(folder)
    tell_what_stays(workspace)
    confirm_size(workspace, yes)
    with progress() as stages:
        fileset = workspace.upload(client.filesets, project, stages)
    return fileset.id, workspace.origin


def tell_what_stays(workspace: Workspace) -> None:
    tree = workspace.tree
    for names, why in (
        (tree.secrets, "Left out for safety"),
        (tree.machine, "Left out (made anew in the job)"),
        (tree.links_outside, "Left out (links that lead out of the folder)"),
        (tree.special, "Left out (not a file)"),
    ):
        tell_left_out(names, why)


def confirm_place(folder: Path, yes: bool) -> None:
    """A home folder or a whole disk is hardly ever meant."""
    real, home = folder.resolve(), None
    with contextlib.suppress(NoHome):
        home = paths.home().resolve()
    if real == Path(real.anchor):
        place = "is the root of the file system"
    elif real == home:
        place = "is your home folder"
    elif home and real in home.parents:
        place = "holds your home folder"
    else:
        return
    _confirm(f"{folder} {place}: send all of it along as the workspace?", yes)


def confirm_size(workspace: Workspace, yes: bool) -> None:
    files, size_bytes = workspace.new_file_count, workspace.new_size_bytes
    if files > ASK_ABOVE_FILES or size_bytes > ASK_ABOVE_BYTES:
        _confirm(f"{files} new files, {readable_size(size_bytes)}: send them along as the workspace?", yes)


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Add --yes, or --no-workspace, or name folders in .nablaignore.")
    click.confirm(question, abort=True, err=True)


def name_of(command: tuple[str, ...]) -> str:
    """From the script's name, else the program's: "python -u train.py --lr 1" is "train"."""
    words = command if len(command) > 1 else tuple(command[0].split())
    script = next((word for word in words if re.search(r"\.(py|sh|R|jl|ipynb)$", word)), words[0] if words else "run")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(script).stem).strip("-.")[:60] or "run"


def model_output(text: str) -> ModelOutput:
    name, equals, rest = text.partition("=")
    path, _, framework = rest.partition(":")
    if not (name and equals and path):
        raise click.BadParameter(f"{text!r} is not NAME=PATH or NAME=PATH:FRAMEWORK.", param_hint="--model")
    return ModelOutput(name, path, framework)
