"""Into a running sandbox from outside: every namespace that its first process is in, as its user, with no more rights.

Whoever was let in is the job's own process from then on: it sees what the job sees, counts as the job's (control
group), and ends with it, because the kernel ends a PID namespace as a whole. Where there are no walls (class
`process`) only the user and the environment are the job's; the session watches the job and ends with it itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.executor.adapters import cgroup, kernel, processes, seccomp
from services.executor.adapters.attempt_folder import AttemptFolder, AttemptSpec
from services.executor.adapters.job_view import job_environment

# The network first: root may have made it, and gives up being root before the rest.
_ORDER = ("net", "ipc", "uts", "pid", "mnt")
_INSIDE_ID = 1000


class NotRunning(Exception):
    """There is nothing to enter: the attempt has not started, or is over."""


@dataclass(frozen=True, slots=True)
class Inside:
    """How to be a process of this attempt."""

    spec: AttemptSpec
    root: int
    environment: Mapping[str, str]
    folder: str

    @property
    def walled(self) -> bool:
        return self.spec.isolation != "process"


def inside_of(folder: AttemptFolder) -> Inside:
    """Raises NotRunning."""
    started = folder.read_started()
    if started is None or folder.read_exit() is not None or not folder.shim_is_alive():
        raise NotRunning("the job has not started its command yet" if started is None else "the job is over")
    spec = folder.read_spec()
    walled = spec.isolation != "process"
    workspace = "/workspace" if walled else spec.workspace_path or str(folder.workspace)
    environment = job_environment(spec, folder) | _secrets(spec, started.pid)
    return Inside(spec, started.pid, environment, workspace)


def _secrets(spec: AttemptSpec, root: int) -> dict[str, str]:
    """Their values are on no disk: only the job's own processes have them."""
    wanted = {name.encode() for name in spec.secret_env}
    for pid in processes.descendants(root) if wanted else []:
        with contextlib.suppress(OSError):
            pairs = (line.partition(b"=") for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
            found = {name.decode(): os.fsdecode(value) for name, _, value in pairs if name in wanted}
            if len(found) == len(wanted):
                return found
    return {}


def enter_network(inside: Inside) -> None:
    """Only the network, for a connection made from in there; the process stays who it is otherwise."""
    if inside.walled:
        spaces = _open(inside.root)
        _enter(spaces, "net")
    if os.geteuid() == 0 and inside.spec.run_as_uid is not None and not inside.walled:
        kernel.become(inside.spec.run_as_uid)


def enter(inside: Inside) -> None:
    """All of it, for this single-threaded process; its children from now on live in there, itself only half.

    The PID namespace counts for children alone: fork once more, and call `shut_behind` in the child.
    """
    for group in cgroup.folders_of(inside.spec.attempt_id):
        with contextlib.suppress(OSError):
            (group / "cgroup.procs").write_text(str(os.getpid()))
    uid = inside.spec.run_as_uid
    if not inside.walled:
        if os.geteuid() == 0 and uid is not None:
            kernel.become(uid)
        return
    spaces = _open(inside.root)
    with contextlib.suppress(PermissionError):  # a network that belongs to the sandbox's own user
        kernel.move_into(spaces["net"])
    if os.geteuid() == 0 and uid is not None:
        kernel.become(uid)
    for name in _ORDER:
        _enter(spaces, name)
    kernel.move_into(spaces["user"])


def shut_behind(inside: Inside) -> None:
    """Gives up, in the forked child, all that it could do more than the job itself."""
    kernel.refuse_new_privileges()
    if inside.walled:
        os.setresgid(_INSIDE_ID, _INSIDE_ID, _INSIDE_ID)
        os.setresuid(_INSIDE_ID, _INSIDE_ID, _INSIDE_ID)
        kernel.drop_capabilities()
    kernel.hide_memory()
    os.umask(0o022)
    os.chdir(inside.folder)
    os.environ.clear()
    os.environ.update(inside.environment)
    program = seccomp.build_filter() if inside.walled else None
    if program is not None:
        kernel.filter_calls(program)


def _open(pid: int) -> dict[str, int]:
    return {name: os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in (*_ORDER, "user")}


def _enter(spaces: Mapping[str, int], name: str) -> None:
    """Into one namespace; without the right to, first into the user namespace that owns it."""
    space = spaces[name]
    if kernel.same_namespace(space, f"/proc/self/ns/{name}"):
        return
    try:
        kernel.move_into(space)
    except PermissionError:
        owner = kernel.owner_of(space)
        try:
            kernel.move_into(owner)
            kernel.move_into(space)
        finally:
            os.close(owner)
