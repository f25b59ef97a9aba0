"""Runs one more command inside a running job: the same walls, limits, user and environment, with or without a terminal.

A program of its own, `start_entry` its only caller: entering namespaces takes a process without threads. It works
from the attempt's folder alone, so it needs neither the shim nor an engine, and is the same for all runtimes. What it
starts ends with the job, and with the program.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

if not __package__:  # run by its path under -I: Python does not look for our packages beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from services.executor.adapters import cgroup, kernel, processes, seccomp
from services.executor.adapters.attempt_folder import AttemptFolder, AttemptSpec, MalformedSpec
from services.executor.adapters.forward import keep_only
from services.executor.adapters.job_view import uid_of, workspace_of
from services.executor.adapters.rlimits import limit
from services.executor.adapters.runtime import offer_to_oom_killer, reset_signals, shell_code
from services.executor.adapters.sandbox import USER_ID

NOT_RUNNING = "the job does not run now"
_JOINED = ("net", "ipc", "uts", "cgroup", "mnt")
_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441
_REPORT_BYTES = 4096
_START_LIMIT_S = 20.0


class CannotEnter(Exception):
    """The command was not started inside the job; the text says why, for the user to read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A command that runs inside. Its exit code is the program's, as a shell gives it; killing that ends it.

    Args:
        terminal: the outer end of its terminal, non-blocking; None when it has pipes, which are the program's.
    """

    program: subprocess.Popen[bytes]
    terminal: int | None

    def resize(self, rows: int, columns: int) -> None:
        if self.terminal is not None:
            set_size(self.terminal, rows, columns)


def start_entry(
    folder: str | os.PathLike[str],
    command: Sequence[str],
    *,
    terminal: bool = False,
    size: tuple[int, int] = (24, 80),
    env: Mapping[str, str] | None = None,
) -> Entry:
    """Starts a command inside a running attempt.

    Args:
        env: goes over the job's own environment.
        size: rows and columns of the terminal.

    Raises:
        CannotEnter.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        request = {
            "folder": os.fspath(folder),
            "command": list(command),
            "terminal": terminal,
            "size": size,
            "env": dict(env or {}),
        }
        program = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).resolve()), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL if terminal else subprocess.PIPE,
            stdout=subprocess.DEVNULL if terminal else subprocess.PIPE,
            stderr=subprocess.DEVNULL if terminal else subprocess.PIPE,
            env={},
            start_new_session=True,
        )
        theirs.close()
        try:
            ours.settimeout(_START_LIMIT_S)
            ours.sendall(json.dumps(request).encode() + b"\n")
            message, descriptors, _, _ = socket.recv_fds(ours, _REPORT_BYTES, 1)
        except OSError as error:
            message, descriptors = str(error).encode(), []
    if message != b"ok":
        program.kill()
        program.wait()
        _close_pipes(program)
        raise CannotEnter(message.decode("utf-8", "replace") or NOT_RUNNING)
    return Entry(program, descriptors[0] if descriptors else None)


def set_size(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _close_pipes(program: subprocess.Popen[bytes]) -> None:
    pipes: list[IO[bytes] | None] = [program.stdin, program.stdout, program.stderr]
    for pipe in pipes:
        if pipe is not None:
            pipe.close()


def main() -> int:
    channel = socket.socket(fileno=int(sys.argv[1]))
    request = json.loads(channel.makefile("rb").readline())
    channel.set_inheritable(False)
    try:
        return _enter(request, channel)
    except (CannotEnter, MalformedSpec, OSError) as error:
        channel.send(str(error).encode()[:_REPORT_BYTES])
        return 1


def _enter(request: Mapping[str, Any], channel: socket.socket) -> int:
    folder = AttemptFolder(request["folder"])
    spec, root = folder.read_spec(), _root_of(folder)
    environment = _environment_of(root) | request["env"]
    kernel.adopt_orphans()
    job_end = os.pidfd_open(root)
    is_root = os.geteuid() == 0
    with _namespaces(root) as opened:
        if opened and not is_root:
            # Root needs no rights from the owner of the namespaces. Anybody else is the owner, and gets them there.
            kernel.move_into_owner_of(opened["mnt"])
        if "pid" in opened:
            kernel.move_into(opened["pid"])  # holds for what is forked from here on
        parent, child = 0 if "pid" in opened else os.getpid(), os.fork()
        if child == 0:
            _Inside(spec, folder, root, opened, parent, is_root).run(request, environment, channel)
    channel.close()
    return _see_through(child, job_end)


def _see_through(child: int, job_end: int) -> int:
    """The command's exit code. The job's end is its end, also without walls."""
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, job_end], [], [])
    if job_end in ready:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    code = shell_code(os.waitpid(child, 0)[1])
    processes.end_descendants()
    return code


def _root_of(folder: AttemptFolder) -> int:
    """The first process of the job, while it is that."""
    shim, started = folder.read_shim(), folder.read_started()
    if shim is None or started is None or not shim.is_alive():
        raise CannotEnter(NOT_RUNNING)
    if started.pid not in processes.descendants(shim.pid):
        raise CannotEnter(NOT_RUNNING)
    return started.pid


def _environment_of(root: int) -> dict[str, str]:
    """The job's own, from its first process: nobody else keeps the values of its secrets."""
    for pid in (*processes.descendants(root), root):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            pairs = [word.split(b"=", 1) for word in words if b"=" in word]
            found = {os.fsdecode(pair[0]): os.fsdecode(pair[1]) for pair in pairs}
            if "NABLA_ATTEMPT_ID" in found:
                return found
    raise CannotEnter(NOT_RUNNING)


@contextlib.contextmanager
def _namespaces(root: int) -> Iterator[dict[str, int]]:
    """Those of the job that differ from ours: none for a job without walls."""
    opened = {}
    try:
        for name in (*_JOINED, "pid", "user"):
            descriptor = os.open(f"/proc/{root}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            if os.path.samestat(os.fstat(descriptor), os.stat(f"/proc/self/ns/{name}")):
                os.close(descriptor)
            else:
                opened[name] = descriptor
        yield opened
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Inside:
    """The forked child: takes on the job's bounds, walls and user, and becomes the command."""

    spec: AttemptSpec
    folder: AttemptFolder
    root: int
    namespaces: Mapping[str, int]
    parent: int
    is_root: bool  # outside: in a user namespace everybody may be called 0

    def run(self, request: Mapping[str, Any], environment: dict[str, str], channel: socket.socket) -> NoReturn:
        try:
            os.setsid()
            reset_signals()
            keep_only([channel.fileno(), *self.namespaces.values()])
            cgroup.join_groups_of(self.root)
            offer_to_oom_killer()
            limit(resource.RLIMIT_CORE, 0)
            self._go_in()
            self._give_up_rights()
            kernel.end_with_parent(signal.SIGKILL, self.parent)
            os.umask(0o022)
            os.chdir("/workspace" if self.spec.is_walled else workspace_of(self.spec, self.folder))
            terminal = _take_terminal(request["size"]) if request["terminal"] else None
            _tell_ok(channel, terminal)
            if terminal is not None:
                environment.setdefault("TERM", "xterm-256color")
            _execute(request["command"], environment)
        except BaseException as error:
            with contextlib.suppress(OSError):
                channel.send(str(error).encode()[:_REPORT_BYTES])
        finally:
            os._exit(1)

    def _go_in(self) -> None:
        if self.is_root:
            os.setgroups([])
            for descriptor in (0, 1, 2):  # its own, or a script's `echo >/dev/stderr` would be refused
                os.fchown(descriptor, uid_of(self.spec), uid_of(self.spec))
        for name in _JOINED:
            if name in self.namespaces:
                kernel.move_into(self.namespaces[name])
        if "user" in self.namespaces:
            kernel.move_into(self.namespaces["user"])

    def _give_up_rights(self) -> None:
        if self.spec.is_walled:
            kernel.drop_bounding_capabilities()
        uid, gid = self._ids()
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        kernel.refuse_new_privileges()
        if self.spec.is_walled:
            kernel.drop_capabilities()
            program = seccomp.build_filter()
            if program is not None:
                kernel.filter_calls(program)

    def _ids(self) -> tuple[int, int]:
        """As the job's own user namespace numbers them."""
        image = self.spec.image
        if self.spec.isolation == "bwrap":
            return int(USER_ID), int(USER_ID)
        if image is not None and image.uid is not None:
            return image.uid, image.gid or 0
        return (os.getuid(), os.getgid()) if self.spec.run_as_uid is None else (uid_of(self.spec),) * 2


def _take_terminal(size: Sequence[int]) -> int:
    """A terminal of the job's own kind becomes this process's; its outer end."""
    outer = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    fcntl.ioctl(outer, _TIOCSPTLCK, struct.pack("i", 0))
    # Not by its path: that is the job's to choose.
    inner = fcntl.ioctl(outer, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
    set_size(inner, *size)
    fcntl.ioctl(inner, termios.TIOCSCTTY, 0)
    for descriptor in (0, 1, 2):
        os.dup2(inner, descriptor)
    os.close(inner)
    return outer


def _tell_ok(channel: socket.socket, terminal: int | None) -> None:
    socket.send_fds(channel, [b"ok"], [] if terminal is None else [terminal])


def _execute(command: Sequence[str], environment: dict[str, str]) -> NoReturn:
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(126 if error.errno == errno.EACCES else 127)


if __name__ == "__main__":
    sys.exit(main())
