"""From a spec to a process that stands ready: pipes, control group, walls, ways through them, then the
command.

The command is held until all around it stands (a front door that does not listen yet would be a connection
refused in the user's first line), and let go by `Job.release`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from services.executor.adapters import forward, kernel, network, processes, sandbox
from services.executor.adapters.attempt_folder import AttemptFolder, AttemptSpec
from services.executor.adapters.cgroup import Cgroup
from services.executor.adapters.network import OpenNetwork

_PIPE_BYTES = 256 * 1024
_F_SETPIPE_SZ = 1031
_SETUP_LIMIT_S = 20.0
_JOB_OOM_SCORE = "300"  # when the node itself runs out, a job goes before the platform
_MESSAGE_BYTES = 2048


class LaunchRefused(Exception):
    """The command was never started; the text says why, for the user to read."""


class _Ends(NamedTuple):
    """The child's ends of the pipes between it and the shim."""

    out: int
    err: int
    error: int
    status: int
    block: int


@dataclass(frozen=True, slots=True)
class Job:
    """A command that is ready to run, or runs. `pid` is the shim's own child: bwrap, or the guardian.

    `root` is the process from which all of the job's processes descend and which is none of them: the first
    one in the sandbox's PID namespace, or the guardian.
    """

    pid: int
    root: int
    walled: bool
    stdout: int
    stderr: int
    _error: int
    _status: int
    _block: int
    ports: dict[int, int] = field(default_factory=dict)
    ways: list[forward.Way] = field(default_factory=list)
    network: OpenNetwork | None = None

    def leave_network(self) -> None:
        """When all of it has ended."""
        if self.network is not None:
            self.network.close()

    def release(self) -> None:
        """Let the command go. Raises LaunchRefused when it cannot be executed at all."""
        try:
            os.write(self._block, b"\0")
        except BrokenPipeError:
            raise LaunchRefused(_read_to_end(self._error) or _read_present(self.stderr)) from None
        os.close(self._block)
        message = _read_to_end(self._error)
        if message:
            raise LaunchRefused(message)

    def signal(self, number: signal.Signals) -> None:
        """Reach the job's own processes, all of them: a shell does not pass a signal on to what it
        started.
        """
        processes.signal_each(processes.descendants(self.root), number)

    def kill(self) -> None:
        """Walled, the kernel ends all with the first process; otherwise the guardian sees its command die."""
        processes.signal_each([self.root] if self.walled else processes.descendants(self.root), signal.SIGKILL)

    def setup_failed(self, code: int) -> bool:
        """Did bwrap end with this code of its own, the command never started? Ask when it has ended."""
        return self.walled and code == 1 and "exit-code" not in _read_to_end(self._status)


def launch(spec: AttemptSpec, folder: AttemptFolder, cgroup: Cgroup | None) -> Job:
    """Everything but the command itself. Raises LaunchRefused; the caller sweeps what is left of the try."""
    if os.geteuid() == 0 and spec.run_as_uid is None:
        raise LaunchRefused("the platform runs as root here, and the spec names no other uid to run the job as")
    with _told_as_refusal():
        sandbox.prepare_folders(spec, folder)
        joined = network.open_network(spec.network, spec.attempt_id, folder.path.parent.parent)
    try:
        return _launch_in(spec, folder, cgroup, joined)
    except LaunchRefused:
        if joined is not None:
            joined.close()
        raise


def _launch_in(spec: AttemptSpec, folder: AttemptFolder, cgroup: Cgroup | None, joined: OpenNetwork | None) -> Job:
    job = _fork_job(spec, folder, cgroup, joined)
    if not job.walled:
        job.ports.update({port: port for port in spec.expose_ports})
        return job
    with _told_as_refusal():
        if cgroup is None:
            sandbox.limit_inside(job.root, spec)
        _open_ways(job, spec)
    return job


def _fork_job(spec: AttemptSpec, folder: AttemptFolder, cgroup: Cgroup | None, joined: OpenNetwork | None) -> Job:
    out, err, error, status, block = (os.pipe() for _ in range(5))
    ends = _Ends(out[1], err[1], error[1], status[1], block[0])
    for pipe in (out, err):
        _prepare_stream(pipe, spec.run_as_uid)
    shim = os.getpid()
    pid = os.fork()
    if pid == 0:
        _run_child(spec, folder, ends, shim, joined)
    for descriptor in ends:
        os.close(descriptor)
    walled = spec.isolation == "bwrap"
    if cgroup is not None:
        cgroup.add(pid)
    root = _sandbox_root(status[0], error[0], err[0]) if walled else pid
    if cgroup is not None and walled:
        cgroup.add(root)  # bwrap may have made it before it was moved itself
    return Job(pid, root, walled, out[0], err[0], error[0], status[0], block[1], network=joined)


def _prepare_stream(pipe: tuple[int, int], uid: int | None) -> None:
    """The job owns its pipes, or a script's `echo >/dev/stderr` would be refused."""
    os.set_blocking(pipe[0], False)
    with contextlib.suppress(OSError):  # many large pipes of one user are refused: it works with small ones
        _set_pipe_size(pipe[0])
    if os.geteuid() == 0 and uid is not None:
        os.fchown(pipe[1], uid, uid)


def _set_pipe_size(descriptor: int) -> None:
    fcntl.fcntl(descriptor, _F_SETPIPE_SZ, _PIPE_BYTES)


def _run_child(
    spec: AttemptSpec, folder: AttemptFolder, ends: _Ends, shim: int, joined: OpenNetwork | None
) -> NoReturn:
    """In the fork: become bwrap or the guardian; what goes wrong before is told through the error pipe."""
    try:
        os.dup2(ends.out, 1)
        os.dup2(ends.err, 2)
        _reset_signals()
        if spec.isolation == "bwrap":
            _offer_to_oom_killer()
            os.umask(0o022)
            descriptor = None if joined is None else joined.descriptor
            sandbox.exec_in_bwrap(spec, folder, ends.status, ends.block, shim, joined=descriptor)
        _guard(spec, folder, ends, shim)
    except Exception as exception:
        os.write(ends.error, str(exception).encode()[:_MESSAGE_BYTES])
    finally:
        os._exit(1)


def _guard(spec: AttemptSpec, folder: AttemptFolder, ends: _Ends, shim: int) -> NoReturn:
    """Stand between shim and command where no PID namespace does: whichever of the two ends, the other's
    processes end too. Orphans of the command come to this process, so a daemon cannot slip away.
    """
    os.setsid()
    kernel.set_name("nabla-guardian")
    kernel.adopt_orphans()
    watched = {signal.SIGCHLD, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    kernel.end_with_parent(signal.SIGTERM, shim)
    forward.keep_only([ends.error, ends.block])
    if not os.read(ends.block, 1):
        os._exit(1)
    command = os.fork()
    if command == 0:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
            _offer_to_oom_killer()
            sandbox.exec_plainly(spec, folder)
        except Exception as exception:
            os.write(ends.error, str(exception).encode()[:_MESSAGE_BYTES])
        finally:
            os._exit(1)
    os.close(ends.error)
    code = 128 + signal.SIGKILL
    while signal.sigwait(watched) == signal.SIGCHLD:
        ended, code = _reap(command)
        if ended:
            break
    processes.end_descendants()
    os._exit(code)


def _reap(command: int) -> tuple[bool, int]:
    """Reap every dead child: (whether the command was among them, its exit code as a shell gives it)."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == command:
            return True, shell_code(status)
        if pid == 0:
            return False, 128 + signal.SIGKILL


def shell_code(status: int) -> int:
    """A wait status as a shell shows it: bwrap knows no other way, so both classes use it."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _offer_to_oom_killer() -> None:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(_JOB_OOM_SCORE)


def _reset_signals() -> None:
    """Ignored signals are inherited through exec, and Python ignores SIGPIPE: `yes | head` would not end."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGURG, signal.SIG_DFL)


def _sandbox_root(status: int, error: int, stderr: int) -> int:
    """The node's number of the sandbox's first process, as bwrap reports it once its namespaces exist."""
    line = _read_line(status)
    try:
        return int(json.loads(line)["child-pid"])
    except (ValueError, KeyError, TypeError):
        reason = _read_to_end(error) or _read_present(stderr) or "bwrap did not come up in time"
        raise LaunchRefused(reason) from None


def _read_line(descriptor: int) -> bytes:
    """One JSON document. bwrap ends it with a newline; "" when bwrap died, or takes too long."""
    line, deadline = b"", time.monotonic() + _SETUP_LIMIT_S
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(descriptor, 1) if ready else b""
        if not piece:
            return b""
        line += piece
    return line


def _open_ways(job: Job, spec: AttemptSpec) -> None:
    uid = spec.run_as_uid if os.geteuid() == 0 else None
    inside = job.network.descriptor if job.network else kernel.open_network(job.root)
    if job.network:
        job.ways.extend(job.network.ways)
    job.ways.extend(network.open_services(spec.network, inside, uid))
    if spec.front_door:
        job.ways.append(forward.open_front_door(inside, spec.front_door, uid))
    if spec.expose_ports:
        way, ports = forward.expose(inside, spec.expose_ports, uid)
        job.ways.append(way)
        job.ports.update(ports)


def _read_to_end(descriptor: int) -> str:
    pieces = iter(lambda: os.read(descriptor, _MESSAGE_BYTES), b"")
    return _text(pieces)


def _read_present(descriptor: int) -> str:
    with contextlib.suppress(BlockingIOError):
        return _text([os.read(descriptor, _MESSAGE_BYTES)])
    return ""


def _text(pieces: Iterable[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", "replace").strip()


@contextlib.contextmanager
def _told_as_refusal() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LaunchRefused(str(error)) from error
