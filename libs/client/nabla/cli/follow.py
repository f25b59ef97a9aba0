"""Following a job: its log as it comes, and at the end the reason and one hint when it failed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from nabla.cli.failures import INTERRUPTED
from nabla.cli.output import note, print_json
from nabla.cli.session import Session
from nabla.decoding import as_json
from nabla.errors import NablaError, Unavailable, Unreachable
from nabla.hints import LAST_LINES, Ending, hint
from nabla.objects import Job, LogLine

if TYPE_CHECKING:
    from nabla.client import Client

TIMED_OUT = 124  # as timeout(1) has it


def follow(session: Session, client: Client, job_id: str, after: int = 0) -> int:
    """Shows everything after a sequence number until the job has ended; answers the job's exit code.

    Ctrl-C leaves the job running, says how to come back, and answers 130 so that no `&&` goes on without it.
    """
    lines: deque[LogLine] = deque(maxlen=LAST_LINES)
    job, state = Job(), ""
    bar = _Bar(sys.stdout.isatty() and sys.stderr.isatty() and not session.as_json)
    try:
        for event in client.jobs.watch(job_id, after, bar.show):
            if isinstance(event, LogLine):
                bar.clear()
                show_line(event, sys.stderr.isatty() and not session.as_json, to_stderr=session.as_json)
                lines.append(event)
            else:
                job, state = event, _tell_state(event, state)
    except KeyboardInterrupt:
        note(f"\n{_come_back(job_id)}")
        return INTERRUPTED
    except (BrokenPipeError, Unreachable, Unavailable):
        note(_come_back(job_id))
        raise
    if session.as_json:
        print_json(job)
    conclude(client, job, lines, from_start=after == 0, in_sight=in_sight(lines, session.as_json))
    return exit_code(job)


def conclude(client: Client, job: Job, lines: Sequence[LogLine], from_start: bool, in_sight: bool) -> None:
    """Ends the following of a job: a failed one with its last lines, the reason and one hint.

    Args:
        lines: the last ones that were shown.
        from_start: these are all there are, where they are fewer than the last lines of a failed job.
        in_sight: they are the last thing to be seen where the reason is said, and are not said again.
    """
    whole = from_start or len(lines) >= LAST_LINES
    if not whole and job.state in ("failed", "timed_out"):
        with contextlib.suppress(NablaError):  # what is known is still worth saying
            lines = client.jobs.tail(job.id, LAST_LINES)
    explain(job, [line.text for line in lines], repeat=not (whole and in_sight))


def explain(job: Job, lines: Sequence[str], repeat: bool = False) -> None:
    """Why a job failed and what may help; with its last lines where they are not on the screen already."""
    if job.state == "succeeded" or not job.ended:
        return
    if repeat and lines and job.state != "cancelled":
        note("The last line:" if len(lines) == 1 else f"The last {len(lines)} lines:")
        for line in lines:
            note(f"  {line}")
    code = f" with exit code {job.exit_code}" if job.exit_code else ""
    note(f"Job {job.id} {job.state.replace('_', ' ')}{code}{': ' if job.detail else ''}{job.detail}")
    advice = hint(Ending.of(job, lines))
    if advice:
        note(f"Hint: {advice}")


def in_sight(lines: Iterable[LogLine], as_json: bool) -> bool:
    """Whether the lines are the last thing on standard error's place, where the reason follows."""
    if _one_place():
        return not as_json  # the job itself came in between
    return as_json or all(_to_stderr(line) for line in lines)


def _one_place() -> bool:
    """Standard output and standard error are one terminal, file or pipe."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        return True
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError):
        return False


def _come_back(job_id: str) -> str:
    return f"Detached; the job goes on. Come back: nabla jobs attach {job_id}. Stop it: nabla jobs stop {job_id}"


def exit_code(job: Job) -> int:
    """The job's own; for one without: 124 when its time ran out, 1 when it failed or was stopped."""
    if job.state == "succeeded":
        return 0
    if job.exit_code:
        return job.exit_code if job.exit_code > 0 else 128 - job.exit_code
    return TIMED_OUT if job.state == "timed_out" else 1


class _Bar:
    """What a job shows on a line that it has not ended, on a terminal's last line, until the next line is shown."""

    def __init__(self, on_terminal: bool) -> None:
        self._on_terminal = on_terminal
        self._shown = False

    def show(self, line: LogLine) -> None:
        self.clear()
        if self._on_terminal and line.text:
            width = shutil.get_terminal_size().columns - 1
            click.echo(f"{line.text[-width:]}\r", nl=False, err=True)
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            click.echo("\x1b[K", nl=False, err=True)
            self._shown = False


def show_line(line: LogLine, dim: bool = False, to_stderr: bool = False) -> None:
    """The job's output on the same stream it was written to; the platform's own words on standard error.

    In a gang's log the lines of all ranks but the first say whose they are.
    """
    text = f"[rank {line.rank}] {line.text}" if line.rank else line.text
    text = click.style(text, dim=True) if line.stream == "nabla" and dim else text
    click.echo(text, nl=not line.cut, err=to_stderr or _to_stderr(line))


def _to_stderr(line: LogLine) -> bool:
    return line.stream in ("nabla", "stderr")


def print_json_line(line: LogLine) -> None:
    click.echo(json.dumps(as_json(line), ensure_ascii=False))


def _tell_state(job: Job, told: str) -> str:
    """Says where the job is until it runs; from then on its own output speaks."""
    now = f"{job.state} {job.detail}"
    if now != told and not job.ended and job.state != "submitted":
        note(f"[{job.state}]{' ' if job.detail else ''}{job.detail}")
    return now
