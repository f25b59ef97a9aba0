"""Failures as people see them: what happened and why, what to do next, on standard error; never a traceback."""

from __future__ import annotations

import os
import sys
from typing import Callable

import click

from nabla.errors import ApiError, Forbidden, NablaError, Unauthenticated

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def guarded(command: Callable[[], object]) -> int:
    """Runs a command and answers the exit code: 1 failed, 2 wrong usage, 130 interrupted, else its own."""
    try:
        code = command()
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return 0
    except Exception as error:
        return _failed(error)
    return code if isinstance(code, int) else 0


def _failed(error: Exception) -> int:
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, NablaError):
        click.echo(render(error), err=True)
        return FAILED
    return _unexpected(error)


def render(error: NablaError) -> str:
    from nabla.cli.output import one_line

    lines = [f"Error: {one_line(str(error))}", *(f"  {line}" for line in [error.remedy or _remedy(error)] if line)]
    if isinstance(error, ApiError) and error.trace_id:
        lines.append(f"  (trace {error.trace_id})")
    return "\n".join(lines)


def _remedy(error: NablaError) -> str:
    if isinstance(error, Unauthenticated):
        return "Sign in again with `nabla login URL`, or check NABLA_TOKEN; `nabla whoami` shows what is used."
    if isinstance(error, Forbidden):
        return "Ask an admin of the team for the role or scope; `nabla whoami` shows yours."
    return ""


def _silence_stdout() -> None:
    """The reader (`| head`) has gone. Python would complain when it flushes at exit, so it gets another place."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unexpected(error: Exception) -> int:
    if os.environ.get("NABLA_DEBUG"):
        raise error
    click.echo(
        f"Error: {type(error).__name__}: {error}\n"
        "  This is a fault of the client. NABLA_DEBUG=1 shows where it happened.",
        err=True,
    )
    return FAILED
