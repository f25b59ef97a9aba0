"""Keeps one installation running: starts its servers and services, and starts again what ends.

The services are forked from this process after everything they share has been imported, so that starting one
takes milliseconds and six of them share most of their memory. Whatever it starts dies with it (parent death
signal); running jobs do not: their shims belong to nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.servers import Server

PR_SET_PDEATHSIG = 1
POLL_S = 0.2
MAX_BACKOFF_S = 30.0
STABLE_S = 60.0
SERVICE_STOP_S = 25.0
# A log that is larger becomes the older one, of which one is kept.
LOG_BYTES = 32 << 20
LOG_LOOK_S = 60.0

log = logging.getLogger("nabla.supervisor")


@dataclass
class Child:
    """Something supervised: restarted at once the first time, then with growing pauses."""

    name: str
    start: Callable[[], int]
    stop_s: float
    is_service: bool
    pid: int = 0
    started_at: float = 0.0
    failures: int = 0
    next_start: float = 0.0

    def ended(self, now: float) -> None:
        self.pid = 0
        self.failures = 0 if now - self.started_at > STABLE_S else self.failures + 1
        # The exponent is bounded too: what fails for a night is beyond what a float can hold.
        pause = 0.0 if self.failures <= 1 else min(MAX_BACKOFF_S, 2.0 ** min(self.failures - 2, 10))
        self.next_start = now + pause * random.uniform(0.8, 1.2)


@dataclass
class Supervisor:
    """Owns the children. Single-threaded on purpose: it forks."""

    run_folder: Path
    logs: Path
    children: dict[str, Child] = field(default_factory=dict)
    stopping: bool = False
    _shown: str = ""
    _logs_seen_s: float = 0.0

    def add_server(self, server: Server) -> None:
        self._add(Child(server.name, lambda: self._spawn(server), server.stop_s, is_service=False))

    def add_service(self, name: str, run: Callable[[str], None], env: dict[str, str]) -> None:
        self._add(Child(name, lambda: self._fork(name, run, env), SERVICE_STOP_S, is_service=True))

    def _add(self, child: Child) -> None:
        self.children[child.name] = child
        self._start(child)

    def watch(self) -> None:
        """Until told to stop by SIGTERM or SIGINT; then stops everything, services first."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        while not self.stopping:
            self.tend()
            time.sleep(POLL_S)
        self.stop_all()

    def tend(self) -> None:
        """Notices what ended, and starts what is due."""
        now = time.monotonic()
        for child in self.children.values():
            if child.pid and (status := _reap(child.pid)) is not None:
                child.ended(now)
                log.warning("%s ended (%s); starting it again", child.name, _in_words(status))
            if not child.pid and now >= child.next_start:
                self._start_again(child)
        self._write_state()
        if now - self._logs_seen_s > LOG_LOOK_S:
            self._logs_seen_s = now
            turn_logs(self.logs)

    def stop_all(self) -> None:
        """Stops in reverse order of starting: services before the servers they need."""
        running = [child for child in self.children.values() if child.pid]
        for services_first in (True, False):
            _stop_group([child for child in running if child.is_service is services_first])
        self._write_state()

    def _start_again(self, child: Child) -> None:
        """A full disk or process table is no reason to stop what still runs: it is tried again, later each time."""
        try:
            self._start(child)
        except OSError as error:
            child.ended(time.monotonic())
            log.error("%s cannot be started: %s", child.name, error)

    def _start(self, child: Child) -> None:
        child.started_at = time.monotonic()
        child.pid = child.start()
        self._write_state()

    def _spawn(self, server: Server) -> int:
        with (self.logs / f"{server.name}.log").open("ab") as output:
            process = subprocess.Popen(
                server.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | server.env,
                cwd=self.run_folder,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has one thread
            )
        return process.pid

    def _fork(self, name: str, run: Callable[[str], None], env: dict[str, str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            _become_service(self.logs / f"{name}.log", env)
            run(name)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 70
        except BaseException:
            logging.getLogger(name).critical("ended by an error", exc_info=True)
        finally:
            logging.shutdown()
            os._exit(code)

    def _write_state(self) -> None:
        """Shows who runs as which process. Where the disk is full, once it is not any more."""
        state = {"pid": os.getpid(), "children": {child.name: child.pid for child in self.children.values()}}
        text = json.dumps(state)
        if text == self._shown:
            return
        temporary = self.run_folder / ".supervisor.json"
        with contextlib.suppress(OSError):
            temporary.write_text(text)
            temporary.replace(self.run_folder / "supervisor.json")
            self._shown = text

    def _ask_to_stop(self, _number: int, _frame: object) -> None:
        self.stopping = True


def turn_logs(folder: Path, largest_bytes: int = LOG_BYTES) -> None:
    """Keeps each log of the folder, and one older one, below a size.

    Copied and emptied, as their writers keep them open (for appending): what is written in between is lost.
    """
    for file in folder.glob("*.log"):
        # A disk that is too full for the copy is full of something else.
        with contextlib.suppress(OSError):
            if file.stat().st_size > largest_bytes:
                shutil.copyfile(file, file.with_suffix(".log.1"))
                os.truncate(file, 0)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def share_memory() -> None:
    """Call after the imports and before the first fork: keeps the collector from touching shared pages."""
    gc.collect()
    gc.freeze()


def _become_service(log_file: Path, env: dict[str, str]) -> None:
    os.setsid()
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    output = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(env)


def _stop_group(group: list[Child]) -> None:
    """All at once; who is not gone after its own time is killed."""
    for child in group:
        _signal(child.pid, signal.SIGTERM)
    began = time.monotonic()
    while group := [child for child in group if _reap(child.pid) is None]:
        for child in group:
            if time.monotonic() - began > child.stop_s:
                _signal(child.pid, signal.SIGKILL)
        time.sleep(0.05)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _reap(pid: int) -> int | None:
    """The exit status when the child has ended."""
    try:
        done, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return status if done else None


def _in_words(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"
