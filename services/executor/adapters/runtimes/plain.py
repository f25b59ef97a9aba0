"""Class `process`: a command without walls, where the kernel refuses namespaces.

A session of its own with rlimits, no_new_privs, an environment built from nothing and, under root, the uid that the
spec names. It sees the host's files and network as that user does: fit for one user's own machine, and never shown as
more.
"""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass
from typing import NoReturn

from services.executor.adapters.attempts import guardian, kernel, processes
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec
from services.executor.adapters.runtimes.cgroup import Cgroup
from services.executor.adapters.runtimes.job_view import job_environment, uid_of, workspace_of, wrapped_command
from services.executor.adapters.runtimes.rlimits import limit
from services.executor.adapters.runtimes.runtime import (
    Job,
    JoinedNetwork,
    LaunchRefused,
    Output,
    leave,
    offer_to_oom_killer,
    read_to_end,
)


@dataclass
class PlainJob(Job):
    """A guardian and, once it is let go, the command below it. `root` is the guardian."""

    _error: int
    _block: int

    def release(self) -> None:
        try:
            os.write(self._block, b"\0")
        except BrokenPipeError:
            raise LaunchRefused(read_to_end(self._error)) from None
        os.close(self._block)
        message = read_to_end(self._error)
        if message:
            raise LaunchRefused(message)

    def kill(self) -> None:
        """The guardian sees its command die, and ends what is left."""
        processes.signal_each(processes.descendants(self.root), signal.SIGKILL)


class Plain:
    """Runtime of class `process`."""

    def start(
        self, spec: AttemptSpec, folder: AttemptFolder, cgroup: Cgroup | None, network: JoinedNetwork | None
    ) -> Job:
        output, block, shim = Output.open(spec.run_as_uid), os.pipe(), os.getpid()
        pid = os.fork()
        if pid == 0:
            _run_child(spec, folder, output, block[0], shim)
        output.close_childs_ends()
        os.close(block[0])
        if cgroup is not None:
            cgroup.add(pid)
        job = PlainJob(pid, pid, output.out[0], output.err[0], output.error[0], block[1])
        job.ports.update({port: port for port in spec.expose_ports})
        return job

    def clean_up(self, spec: AttemptSpec, folder: AttemptFolder) -> None:
        """Nothing outlives the processes."""


def _run_child(spec: AttemptSpec, folder: AttemptFolder, output: Output, block: int, shim: int) -> NoReturn:
    try:
        output.become_standard()
        guardian.guard(output, block, shim, lambda: exec_plainly(spec, folder))
    except Exception as exception:
        output.tell(exception)
    finally:
        leave()


def exec_plainly(spec: AttemptSpec, folder: AttemptFolder) -> NoReturn:
    """Turn this process into the command, without walls. Raises PermissionError where its uid cannot get
    in.
    """
    offer_to_oom_killer()
    os.setsid()
    uid = uid_of(spec)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NPROC, processes.threads_of(uid) + spec.pids_limit)
    kernel.refuse_new_privileges()
    if os.geteuid() == 0:
        kernel.become(uid)
    os.umask(0o022)
    os.chdir(workspace_of(spec, folder))
    command = wrapped_command(spec)
    os.execve(command[0], command, job_environment(spec, folder))
