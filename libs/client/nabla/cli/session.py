"""What every command shares: `--json` and `--context`, an example in its help, and a client when it needs one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable

import click

if TYPE_CHECKING:
    from nabla.client import Client
    from nabla.errors import NablaError

READING_PATIENCE_S = 20.0


class Session:
    """One invocation of the command line."""

    def __init__(self) -> None:
        self.context_name: str | None = None
        self.as_json = False
        self.connect: Callable[[float], Client] = self._connect
        self._told = ""

    def client(self, patience_s: float = READING_PATIENCE_S) -> Client:
        """A client of the server in force; an unanswered request is repeated for `patience_s` and that is said."""
        client = self.connect(patience_s)
        click.get_current_context().call_on_close(client.close)
        return client

    def _connect(self, patience_s: float) -> Client:
        from nabla.client import Client
        from nabla.tracing import traceparent

        return Client(context=self.context_name, patience_s=patience_s, on_retry=self._tell, traceparent=traceparent())

    def _tell(self, error: NablaError, left_s: float) -> None:
        """One line for each new reason: what is wrong and why, and until when it is tried again."""
        import time

        from nabla.cli.output import note, one_line

        reason = one_line(getattr(error, "detail", "") or str(error)).rstrip(".")
        if reason != self._told:
            self._told = reason
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + left_s))
            note(f"{reason}. Trying again until {until}.")


pass_session = click.make_pass_decorator(Session, ensure=True)


class GlobalOptions:
    """The options that every command has. They are read into the Session and not passed to the command."""

    @staticmethod
    def context() -> click.Option:
        return click.Option(
            ["--context"],
            metavar="NAME",
            expose_value=False,
            callback=_set_context,
            help="Use this saved context.",
        )

    @staticmethod
    def json() -> click.Option:
        return click.Option(
            ["--json"], is_flag=True, expose_value=False, callback=_set_json, help="JSON on standard output."
        )


def _set_context(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value:
        ctx.ensure_object(Session).context_name = value


def _set_json(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Session).as_json = True


class Command(click.Command):
    """A command with the shared options and, at the end of its help, an example that works as it stands."""

    def __init__(self, name: str | None, *, example: str | Sequence[str] = (), **attributes: object) -> None:
        super().__init__(name, **attributes)  # type: ignore[arg-type]
        self.examples = (example,) if isinstance(example, str) else tuple(example)
        self.params += [GlobalOptions.json(), GlobalOptions.context()]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Example" if len(self.examples) == 1 else "Examples"):
            for line in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Group(click.Group):
    command_class = Command
