"""The `nabla` command. Each command lives in a module of its own that is loaded only when it is called for, so
that the command line answers at once.
"""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module

import click

from nabla.cli.session import GlobalOptions

# name -> (module, attribute, what `nabla --help` says)
COMMANDS = {
    "run": ("run", "run", "Run a command as a job, with this folder as its workspace."),
    "jobs": ("jobs", "jobs", "List, watch, explain, stop and repeat jobs."),
    "experiments": ("experiments", "experiments", "Start and list experiments."),
    "artifacts": ("artifacts", "artifacts", "List and download what a job left behind."),
    "models": ("models", "models", "The model repository."),
    "deployments": ("deployments", "deployments", "Serve a model behind an endpoint."),
    "predict": ("predict", "predict", "Ask a deployed model."),
    "projects": ("projects", "projects", "Create and manage projects."),
    "open": ("account", "open_link", "Print a one-time link to the web interface."),
    "login": ("account", "login", "Save a server and a token for it."),
    "logout": ("account", "logout", "Forget the token of a server."),
    "whoami": ("account", "whoami", "Show who you are to which server."),
    "contexts": ("contexts", "contexts", "Choose between saved servers."),
    "nodes": ("nodes", "nodes", "List the machines that jobs run on, and drain them."),
    "node": ("nodes", "node", "Make another machine a node, or take this one off."),
    "tokens": ("tokens", "tokens", "Create and revoke API tokens."),
    "up": ("platform", "up", "Start the platform on this machine."),
    "down": ("platform", "down", "Stop the platform on this machine."),
    "machines": ("queueing", "machines", "Show the machine types and how many are free."),
    "status": ("platform", "status", "Show services, nodes and isolation."),
    "doctor": ("doctor", "doctor", "Check everything, and say how to put it right."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        command: click.Command = getattr(import_module(f"nabla.cli.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Example"):
            formatter.write_text("nabla run -- python train.py")


def show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from nabla import __version__

        click.echo(f"nabla {__version__}")
        ctx.exit()


root = LazyGroup(
    name="nabla",
    help="Train, track, register and serve models on your own machines.",
    params=[
        GlobalOptions.context(),
        click.Option(
            ["--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=show_version,
            help="Show the version.",
        ),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _prepare_streams() -> None:
    """A log may hold what a terminal, or Windows in a pipe, cannot write; and a stream may be closed (`>&-`)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """The console script: never a traceback, and an exit code that means something."""
    from nabla.cli.failures import guarded

    _prepare_streams()
    color = False if os.environ.get("NO_COLOR") else None
    sys.exit(guarded(lambda: root.main(prog_name="nabla", standalone_mode=False, color=color)))
