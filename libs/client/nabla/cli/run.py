"""nabla run"""

from __future__ import annotations

from pathlib import Path

import click

from nabla.cli.session import Command, Session, pass_session
from nabla.cli.submission import Options, submission_options, submit_and_follow

# Options end at the command: what follows belongs to it, also without "--".
SUBMITTING = {"ignore_unknown_options": False, "allow_interspersed_args": False}


@click.command(
    cls=Command,
    context_settings=SUBMITTING,
    example=(
        "nabla run -- python train.py --epochs 3",
        "nabla run --gpus 1 --memory 8G --env active --env SEED=1 -- python train.py",
        "nabla run --model digits=model:sklearn -- python train.py",
    ),
)
@submission_options
@pass_session
def run(session: Session, /, **said: object) -> int:
    """Run COMMAND as a job with this folder as its workspace, and follow its log.

    Several words are a program and its arguments; a single quoted one is a line for the shell. The exit code is
    the job's. Ctrl-C leaves the job running; `nabla jobs attach` comes back to it.
    """
    return submit_and_follow(session, Options(**said), Path.cwd())  # type: ignore[arg-type]
