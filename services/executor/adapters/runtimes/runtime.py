"""The port through which a shim has a command run: behind which walls is the adapter's own business.

`sandbox` (bubblewrap), `plain` (class process) and `podman` implement it, and pass one suite. What all of them have
in common is here: the pipes, the refusal, what may be done to a running job.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn, Protocol, Self

from services.executor.adapters.attempts import forward, processes
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec
from services.executor.adapters.networks.network import OpenNetwork
from services.executor.adapters.runtimes.cgroup import Cgroup

MESSAGE_BYTES = 2048
_PIPE_BYTES = 256 * 1024
_F_SETPIPE_SZ = 1031
_JOB_OOM_SCORE = "300"  # when the node itself runs out, a job goes before the platform


class LaunchRefused(Exception):
    """The command was never started; the text says why, for the user to read."""


@dataclass
class Job(abc.ABC):
    """A command that is ready to run, or runs.

    Attributes:
        pid: the shim's own child, whose end is the job's and whose exit code is the command's.
        root: the process from which all of the job's processes descend and which is none of them.
        ports: inside port -> port of the node's loopback.
        network: what its walls joined, when they did not make one themselves.
    """

    pid: int
    root: int
    stdout: int
    stderr: int
    ports: dict[int, int] = field(default_factory=dict, kw_only=True)
    ways: list[forward.Way] = field(default_factory=list, kw_only=True)
    network: OpenNetwork | None = field(default=None, kw_only=True)

    def leave_network(self) -> None:
        """When all of it has ended."""
        if self.network is not None:
            self.network.close()

    @abc.abstractmethod
    def release(self) -> None:
        """Let the command go. Raises LaunchRefused when it cannot be executed at all."""

    def signal(self, number: signal.Signals) -> None:
        """Reach the job's own processes, all of them: a shell does not pass a signal on to what it
        started.
        """
        processes.signal_each(processes.descendants(self.root), number)

    def kill(self) -> None:
        """Behind walls the kernel ends all of the job with its first process."""
        processes.signal_each([self.root], signal.SIGKILL)

    def setup_failed(self, code: int, said: bytes) -> bool:
        """Is this exit code the builder's of the walls, the command never started? Ask when it has ended.

        Args:
            said: the end of what came on stderr.
        """
        return False

    def told_code(self, code: int, said: bytes) -> int:
        """The exit code as a shell gives it. `said` is the end of what came on stderr."""
        return code


class JoinedNetwork(Protocol):
    """A network namespace that walls join: `descriptor` in this process, `path` for other programs."""

    @property
    def descriptor(self) -> int: ...

    @property
    def path(self) -> str: ...


class Runtime(Protocol):
    """One kind of walls."""

    def start(
        self, spec: AttemptSpec, folder: AttemptFolder, cgroup: Cgroup | None, network: JoinedNetwork | None
    ) -> Job:
        """Everything but the command itself, which is held until `Job.release`.

        Walls without a network to join have one of their own, with loopback alone.

        All that it makes dies with the calling process, or is removed by `clean_up`. Raises LaunchRefused, OSError.
        """

    def clean_up(self, spec: AttemptSpec, folder: AttemptFolder) -> None:
        """Remove what of an attempt outlives its processes: mounts, records. Harmless when nothing does."""


@dataclass(frozen=True, slots=True)
class Output:
    """The job's stdout and stderr as pipes, and one on which its child says why it could not begin."""

    out: tuple[int, int]
    err: tuple[int, int]
    error: tuple[int, int]

    @classmethod
    def open(cls, uid: int | None) -> Self:
        """The job owns its pipes, or a script's `echo >/dev/stderr` would be refused."""
        pipes = cls(os.pipe(), os.pipe(), os.pipe())
        for read, write in (pipes.out, pipes.err):
            os.set_blocking(read, False)
            with contextlib.suppress(OSError):  # many large pipes of one user are refused: it works with small ones
                fcntl.fcntl(read, _F_SETPIPE_SZ, _PIPE_BYTES)
            if os.geteuid() == 0 and uid is not None:
                os.fchown(write, uid, uid)
        return pipes

    def close_childs_ends(self) -> None:
        for _, write in (self.out, self.err, self.error):
            os.close(write)

    def become_standard(self) -> None:
        """In the child."""
        os.dup2(self.out[1], 1)
        os.dup2(self.err[1], 2)
        reset_signals()

    def tell(self, error: Exception) -> None:
        """In the child: why it could not begin."""
        os.write(self.error[1], str(error).encode()[:MESSAGE_BYTES])


def reset_signals() -> None:
    """Ignored signals are inherited through exec, and Python ignores SIGPIPE: `yes | head` would not end."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGURG, signal.SIG_DFL)


def offer_to_oom_killer(pid: int | str = "self") -> None:
    with open(f"/proc/{pid}/oom_score_adj", "w") as file:
        file.write(_JOB_OOM_SCORE)


def shell_code(status: int) -> int:
    """A wait status as a shell shows it: bwrap knows no other way, so all classes use it."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def read_to_end(descriptor: int) -> str:
    pieces = iter(lambda: os.read(descriptor, MESSAGE_BYTES), b"")
    return _text(pieces)


def read_present(descriptor: int) -> str:
    with contextlib.suppress(BlockingIOError):
        return _text([os.read(descriptor, MESSAGE_BYTES)])
    return ""


def leave() -> NoReturn:
    """The end of a forked child that became nothing else."""
    os._exit(1)


def _text(pieces: Iterable[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", "replace").strip()
