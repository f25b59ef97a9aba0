"""Into a running sandbox from outside: every namespace that its first process is in, as its user, with no more rights.

Whoever was let in is the job's own process from then on: it sees what the job sees, counts as the job's (control
group), and ends with it, because the kernel ends a PID namespace as a whole. Where there are no walls (class
`process`) only the user and the environment are the job's; the session watches the job and ends with it itself.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.executor.adapters.attempts import kernel, processes
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec
from services.executor.adapters.runtimes import cgroup, seccomp
from services.executor.adapters.runtimes.job_view import uid_of, workspace_of
from services.executor.adapters.runtimes.rlimits import limit
from services.executor.adapters.runtimes.runtime import offer_to_oom_killer
from services.executor.adapters.runtimes.sandbox import USER_ID

# The mounts last but one: what is read of /proc is read before.
_ORDER = ("net", "ipc", "uts", "cgroup", "pid", "mnt")


class NotRunning(Exception):
    """There is nothing to enter: the attempt has not started, or is over."""


@dataclass(frozen=True, slots=True)
class Inside:
    """How to be a process of this attempt: `folder` is where it begins, `root` the job's first process."""

    spec: AttemptSpec
    root: int
    environment: Mapping[str, str]
    folder: str

    @property
    def ids(self) -> tuple[int, int]:
        """User and group, as the job's own user namespace numbers them."""
        image = self.spec.image
        if self.spec.isolation == "bwrap":
            return int(USER_ID), int(USER_ID)
        if image is not None and image.uid is not None:
            return image.uid, image.gid or 0
        uid = uid_of(self.spec)
        return uid, uid if self.spec.run_as_uid is not None else os.getegid()


def inside_of(folder: AttemptFolder) -> Inside:
    """Raises NotRunning."""
    started = folder.read_started()
    if started is None:
        raise NotRunning("the job has not started its command yet")
    if folder.read_exit() is not None or not folder.shim_is_alive():
        raise NotRunning("the job is over")
    spec = folder.read_spec()
    place = "/workspace" if spec.is_walled else workspace_of(spec, folder)
    return Inside(spec, started.pid, _environment_of(started.pid), place)


def enter_network(inside: Inside) -> None:
    """Only the network, for a connection made from in there; without walls, only the job's user."""
    if inside.spec.is_walled:
        with _namespaces(inside.root) as spaces:
            _enter(spaces, "net")
    elif os.geteuid() == 0:
        kernel.become(uid_of(inside.spec))


def enter(inside: Inside) -> None:
    """All of it, for this single-threaded process; its children from now on live in there, itself only half.

    The PID namespace counts for children alone: fork once more, and call `shut_behind` in the child.
    """
    cgroup.join_groups_of(inside.root)
    offer_to_oom_killer()
    limit(resource.RLIMIT_CORE, 0)
    if os.geteuid() == 0:
        os.setgroups([])
    with _namespaces(inside.root) as spaces:
        for name in (*_ORDER, "user"):
            _enter(spaces, name)


def shut_behind(inside: Inside) -> None:
    """Gives up, in the forked child, all that it could do more than the job itself."""
    if inside.spec.is_walled:
        kernel.drop_bounding_capabilities()
    uid, gid = inside.ids
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    kernel.refuse_new_privileges()
    if inside.spec.is_walled:
        kernel.drop_capabilities()
    kernel.hide_memory()
    os.umask(0o022)
    os.chdir(inside.folder)
    os.environ.clear()
    os.environ.update(inside.environment)
    program = seccomp.build_filter() if inside.spec.is_walled else None
    if program is not None:
        kernel.filter_calls(program)


def _environment_of(root: int) -> dict[str, str]:
    """The job's own, from its processes: nobody else keeps the values of its secrets. Raises NotRunning."""
    for pid in (*processes.descendants(root), root):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            pairs = (word.partition(b"=") for word in words if word)
            found = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
            if "NABLA_ATTEMPT_ID" in found:
                return found
    raise NotRunning("no process of the job shows its environment")


@contextlib.contextmanager
def _namespaces(root: int) -> Iterator[Mapping[str, int]]:
    """Those of the job that differ from ours: none for a job without walls."""
    opened: dict[str, int] = {}
    try:
        for name in (*_ORDER, "user"):
            descriptor = os.open(f"/proc/{root}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            if os.path.samestat(os.fstat(descriptor), os.stat(f"/proc/self/ns/{name}")):
                os.close(descriptor)
            else:
                opened[name] = descriptor
        yield opened
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _enter(spaces: Mapping[str, int], name: str) -> None:
    """Into one namespace; without the right to, first into the user namespace that owns it."""
    if name not in spaces:
        return
    try:
        kernel.move_into(spaces[name])
    except PermissionError:
        kernel.move_into_owner_of(spaces[name])
        kernel.move_into(spaces[name])
