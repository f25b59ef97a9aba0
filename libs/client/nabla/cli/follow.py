"""Following a job: its log as it comes, and at the end the reason and one hint when it failed."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Sequence

import click

from nabla.cli.failures import INTERRUPTED
from nabla.cli.output import note, print_json
from nabla.cli.session import Session
from nabla.client import Client
from nabla.decoding import as_json
from nabla.hints import LAST_LINES, Ending, hint
from nabla.objects import Job, LogLine

TIMED_OUT = 124  # as timeout(1) has it


def follow(session: Session, client: Client, job_id: str, after: int = 0) -> int:
    """Shows everything after a sequence number until the job has ended; answers the job's exit code.

    Ctrl-C leaves the job running, says how to come back, and answers 130 so that no `&&` goes on without it.
    """
    lines: deque[str] = deque(maxlen=LAST_LINES)
    job, state = Job(), ""
    try:
        for event in client.jobs.watch(job_id, after):
            if isinstance(event, LogLine):
                show_line(event, sys.stderr.isatty() and not session.as_json, to_stderr=session.as_json)
                lines.append(event.text)
            else:
                job, state = event, _tell_state(event, state)
    except KeyboardInterrupt:
        note(f"\nDetached; the job goes on. Come back: nabla jobs attach {job_id}. Stop it: nabla jobs stop {job_id}")
        return INTERRUPTED
    if session.as_json:
        print_json(job)
    explain(job, list(lines))
    return exit_code(job)


def explain(job: Job, lines: Sequence[str], repeat: bool = False) -> None:
    """Why a job failed and what may help; with its last lines where they are not on the screen already."""
    if job.state == "succeeded" or not job.ended:
        return
    if repeat and lines:
        note(f"The last {len(lines)} lines:")
        for line in lines:
            note(f"  {line}")
    code = f" with exit code {job.exit_code}" if job.exit_code else ""
    note(f"Job {job.id} {job.state.replace('_', ' ')}{code}{': ' if job.detail else ''}{job.detail}")
    advice = hint(Ending.of(job, lines))
    if advice:
        note(f"Hint: {advice}")


def exit_code(job: Job) -> int:
    """The job's own; for one without: 124 when its time ran out, 1 when it failed or was stopped."""
    if job.state == "succeeded":
        return 0
    if job.exit_code:
        return job.exit_code if job.exit_code > 0 else 128 - job.exit_code
    return TIMED_OUT if job.state == "timed_out" else 1


def show_line(line: LogLine, dim: bool = False, to_stderr: bool = False) -> None:
    """The job's output on the same stream it was written to; the platform's own words on standard error."""
    own = line.stream == "nabla"
    text = click.style(line.text, dim=True) if own and dim else line.text
    click.echo(text, err=to_stderr or own or line.stream == "stderr")


def print_json_line(line: LogLine) -> None:
    click.echo(json.dumps(as_json(line), ensure_ascii=False))


def _tell_state(job: Job, told: str) -> str:
    """Says where the job is until it runs; from then on its own output speaks."""
    now = f"{job.state} {job.detail}"
    if now != told and not job.ended and job.state != "submitted":
        note(f"[{job.state}]{' ' if job.detail else ''}{job.detail}")
    return now
