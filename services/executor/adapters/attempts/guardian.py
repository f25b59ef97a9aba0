"""Stands between a shim and a command where no PID namespace of ours does: whichever of the two ends, all that came
of the command ends too.

Orphans of the command come to the guardian, so a daemon cannot slip away; its own come to the shim, so neither of
the two can be killed in a way that leaves processes behind.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import NoReturn

from services.executor.adapters.attempts import forward, kernel, processes
from services.executor.adapters.runtimes.runtime import Output, shell_code

_LOOK_S = 0.01


def guard(
    output: Output,
    block: int,
    shim: int,
    become_command: Callable[[], NoReturn],
    *,
    leaving_s: float = 0.0,
    at_last: Callable[[], None] = lambda: None,
) -> NoReturn:
    """Be the guardian, in a forked child of the shim.

    Args:
        block: the command is started when a byte can be read here; never, when the other end is closed.
        leaving_s: how long what is left after the command's end may take to leave by itself.
        at_last: called when all has ended, whichever of the two ended it.
    """
    os.setsid()
    kernel.set_name("nabla-guardian")
    kernel.adopt_orphans()
    watched = {signal.SIGCHLD, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    kernel.end_with_parent(signal.SIGTERM, shim)
    forward.keep_only([output.error[1], block])
    if not os.read(block, 1):
        os._exit(1)
    command = os.fork()
    if command == 0:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
            become_command()
        except Exception as exception:
            output.tell(exception)
        finally:
            os._exit(1)
    os.close(output.error[1])
    code = _watch(command, watched)
    if code is not None:
        _let_leave(leaving_s)
    processes.end_descendants()
    at_last()
    os._exit(128 + signal.SIGKILL if code is None else code)


def _watch(command: int, watched: set[signal.Signals]) -> int | None:
    """The command's exit code as a shell gives it; None when the shim is gone."""
    while signal.sigwait(watched) == signal.SIGCHLD:
        ended, code = _reap(command)
        if ended:
            return code
    return None


def _reap(command: int) -> tuple[bool, int]:
    """Reap every dead child: (whether the command was among them, its exit code)."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == command:
            return True, shell_code(status)
        if pid == 0:
            return False, 0


def _let_leave(limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(_LOOK_S)
        except ChildProcessError:
            return
