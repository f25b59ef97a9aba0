"""Class `podman`: an OCI image, run by podman in the foreground.

podman makes the container: image, file system, namespaces, devices by CDI. What it is to run, and what of the node it
sees, this module writes into the container's configuration on its way from podman to the OCI runtime (stand_in.py): no
value appears on a command line or in podman's records, and no path needs quoting. No value of a secret is on a disk:
the command's shell reads them from a pipe, and for an image without a shell the configuration itself lies in memory;
where the node has none of that kind, the job is refused. The container is held when its namespaces exist (hold.py), so
that limits and ways through the walls stand before the command does.

The process tree is shim -> guardian -> podman, and conmon and the container come to the guardian as orphans:
whichever of them is killed, the others end, and the guardian has podman forget the container. A container whose
shim and guardian were both killed is removed by `clean_up` and `remove_strays`, which the node agent calls.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from services.executor.adapters.attempts import guardian, processes
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec, Image
from services.executor.adapters.runtimes import seccomp
from services.executor.adapters.runtimes.cgroup import Cgroup
from services.executor.adapters.runtimes.hold import (
    MEMORY,
    NO_HOOKS,
    Hold,
    NoAnswer,
    forget,
    hold_folder,
    is_forgotten,
    why_not_in_memory,
)
from services.executor.adapters.runtimes.job_view import (
    SYSTEM_PATH,
    hosts_file,
    job_environment,
    mounts_for,
    resolver_file,
    uid_of,
    wrapped_command,
)
from services.executor.adapters.runtimes.rlimits import limit
from services.executor.adapters.runtimes.runtime import (
    Job,
    JoinedNetwork,
    LaunchRefused,
    Output,
    leave,
    read_present,
    read_to_end,
)
from services.executor.adapters.runtimes.stand_in import runtime_of, with_stand_in

ATTEMPT_LABEL = "nabla.attempt"
NODE_LABEL = "nabla.node"

_LEAVING_S = 10.0
_REMOVAL_LIMIT_S = 60.0
_REMOVALS = 5
STAND_INS = "runtimes"
_OOM_SCORE = 300  # when the node itself runs out, a job goes before the platform
_KILLS_BEFORE_PODMAN = 10
_LOOK_S = 0.001
_STARTING_LIMIT_S = 10.0
# podman's own exit codes, which commands may have too, and what it says when its runtime would not start one.
_OWN_CODES = frozenset({125, 126, 127})
_RUNTIME_FAILED = b"OCI "
# podman's own know neither the platform's name server nor a gang's peers.
_ETC_FILES: Mapping[str, Callable[[AttemptSpec], str]] = {"hosts": hosts_file, "resolv.conf": resolver_file}
_SECRETS_INSIDE = "/run/nabla-secrets"
_READ_SECRETS = (
    'nabla_all=; while IFS= read -r nabla_line && [ "$nabla_line" != "$0" ]; do nabla_all="$nabla_all$nabla_line\n"; '
    f'done < {_SECRETS_INSIDE}; eval "$nabla_all"; unset nabla_all nabla_line; exec "$@"'
)
_NOT_EXECUTED = {b"No such file or directory": 127, b"Permission denied": 126}


@dataclass
class PodmanJob(Job):
    """A guardian and a held container. `root` is the container's first process, podman's small init."""

    _hold: Hold
    _has_shell: bool
    _kills: int = 0
    _has_started: bool = False

    def release(self) -> None:
        """Returns when the runtime has become the command: a third hook could say so, and would cost 10 ms."""
        before, deadline = processes.name_of(self.root), time.monotonic() + _STARTING_LIMIT_S
        self._hold.let_go()
        while processes.start_ticks(self.root) is not None and time.monotonic() < deadline:
            if processes.name_of(self.root) not in (before, ""):
                self._has_started = True
                return
            time.sleep(_LOOK_S)

    def kill(self) -> None:
        """With its first process the container ends, and podman after it; where podman itself hangs, podman too."""
        self._kills += 1
        super().kill()
        if self._kills > _KILLS_BEFORE_PODMAN:
            processes.signal_each(processes.descendants(self.pid), signal.SIGKILL)

    def setup_failed(self, code: int, said: bytes) -> bool:
        """A command that was over before anybody saw it run is told from one that never did by podman's words."""
        last = said.rstrip().rpartition(b"\n")[2]
        return not self._has_started and code in _OWN_CODES and last.startswith(b"Error: ") and _RUNTIME_FAILED in last

    def told_code(self, code: int, said: bytes) -> int:
        """Without a shell in the image its init starts the command, and says in words why it could not."""
        if self._has_shell or code != 1 or b"failed to exec pid1" not in said:
            return code
        return next((known for words, known in _NOT_EXECUTED.items() if said.rstrip().endswith(words)), code)


class Podman:
    """Runtime of class `podman`.

    Args:
        memory: a folder whose files are on no disk.
    """

    def __init__(self, memory: Path = MEMORY) -> None:
        self._memory = memory

    def start(
        self, spec: AttemptSpec, folder: AttemptFolder, cgroup: Cgroup | None, network: JoinedNetwork | None
    ) -> Job:
        image = _image_of(spec)
        told_by_config = bool(spec.secret_env) and not image.has_shell
        if told_by_config and (why_not := why_not_in_memory(runtime_of(image.engine), self._memory)):
            raise LaunchRefused(
                f"the image {image.name} has no shell that could read the job's secrets, and {why_not}: they would get "
                "onto its disk; take an image with /bin/sh, or have an administrator mount a tmpfs there"
            )
        output, block, shim = Output.open(spec.run_as_uid), os.pipe(), os.getpid()
        engine = with_stand_in(image.engine, folder.path.parent.parent / STAND_INS, hold_folder(folder))
        command = run_command(spec, folder, f"ns:{network.path}" if network else "none", engine)
        pid = os.fork()
        if pid == 0:
            _run_child(output, block[0], shim, command, lambda: self.clean_up(spec, folder))
        output.close_childs_ends()
        os.close(block[0])
        hold = Hold(folder)
        for name, make in _ETC_FILES.items():
            write_readable(hold.path / name, make(spec))
        os.write(block[1], b"\0")
        os.close(block[1])
        with _told(output):
            config = hold.hear_config(pid)
            handed = hold.hand_over(secrets_of(spec), uid_of(spec)) if secrets_of(spec) else ""
            ours = job_config(config, spec, folder, bounded=cgroup is not None, handed=handed)
            hold.answer(ours, self._memory if told_by_config else None)
            root = hold.hear_root(pid)
        if cgroup is not None:
            cgroup.add(root)
        return PodmanJob(pid, root, output.out[0], output.err[0], hold, image.has_shell)

    def clean_up(self, spec: AttemptSpec, folder: AttemptFolder) -> None:
        """podman removes a container that ended by itself; this one may have been killed with all around it."""
        for _ in range(_REMOVALS):  # conmon may have podman remove it at the same time, and one of the two fails
            if is_forgotten(folder):
                return
            if remove_container(_image_of(spec).engine, container_of(spec.attempt_id)):
                forget(folder)


def write_readable(path: Path, text: str) -> None:
    """For every user of a container; nobody else comes through the attempt's folder."""
    path.write_text(text)
    path.chmod(0o644)


def container_of(attempt_id: str) -> str:
    return f"nabla-{attempt_id}"


def remove_container(engine: list[str], name: str) -> bool:
    """Ends and forgets a container, with its mounts and control group; True when none of that name is left."""
    command = [*engine, "rm", "--force", "--ignore", "--time", "0", "--volumes", name]
    try:
        done = subprocess.run(
            command, env=podman_environment(), capture_output=True, timeout=_REMOVAL_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def remove_strays(engine: list[str], node: str, is_alive: Callable[[str], bool]) -> int:
    """Removes the containers of this node folder whose attempts nobody watches over; how many there were."""
    form = f'{{{{.Names}}}} {{{{index .Labels "{ATTEMPT_LABEL}"}}}}'
    command = [*engine, "ps", "--all", "--filter", f"label={NODE_LABEL}={node}", "--format", form]
    try:
        listed = subprocess.run(
            command, env=podman_environment(), capture_output=True, text=True, timeout=_REMOVAL_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = [line.split() for line in listed.stdout.splitlines()]
    strays = [pair[0] for pair in found if len(pair) == 2 and not is_alive(pair[1])]
    return sum(remove_container(engine, name) for name in strays)


def podman_environment() -> dict[str, str]:
    """Nothing of a job's, and nothing of the platform's own: podman runs as the platform's user."""
    environment = {"PATH": SYSTEM_PATH, "HOME": pwd.getpwuid(os.geteuid()).pw_dir, "LANG": "C.UTF-8"}
    runtime_folder = f"/run/user/{os.geteuid()}"
    if os.geteuid() != 0 and os.path.isdir(runtime_folder):
        environment["XDG_RUNTIME_DIR"] = runtime_folder
    return environment


def run_command(spec: AttemptSpec, folder: AttemptFolder, network: str, engine: Sequence[str]) -> list[str]:
    """What `podman run` is told: all that podman itself must know, and nothing of what the job is."""
    image = _image_of(spec)
    return [
        *engine,
        f"--hooks-dir={hold_folder(folder) / NO_HOOKS}",
        "run",
        "--rm",
        "--init",
        "--pull=never",
        "--log-driver=passthrough",
        "--sig-proxy=false",
        "--http-proxy=false",
        "--no-healthcheck",
        "--systemd=false",
        "--image-volume=ignore",
        "--cap-drop=all",
        "--security-opt=no-new-privileges",
        "--security-opt=seccomp=unconfined",  # it gets the filter of sandboxes: podman's would take 20 ms to compile
        "--no-hosts",
        "--ipc=none",  # /dev/shm is the job's own
        f"--network={network}",
        f"--hostname={spec.attempt_id}",
        f"--name={container_of(spec.attempt_id)}",
        f"--label={ATTEMPT_LABEL}={spec.attempt_id}",
        f"--label={NODE_LABEL}={node_label(folder.path.parent.parent)}",
        *_user(spec, image),
        *(f"--device={device}" for device in image.devices),
        *image.options,
        image.image,
        "true",  # replaced in the configuration
    ]


def node_label(node_dir: Path) -> str:
    return str(node_dir.resolve())


def secrets_of(spec: AttemptSpec) -> dict[str, str]:
    """Those of the job's variables that are read from a pipe."""
    return {name: spec.env[name] for name in spec.secret_env} if _image_of(spec).has_shell else {}


def job_config(
    config: Mapping[str, Any], spec: AttemptSpec, folder: AttemptFolder, *, bounded: bool, handed: str
) -> dict[str, Any]:
    """podman's configuration of the container with the job's command, environment, mounts and limits.

    Args:
        bounded: whether a control group bounds the number of processes.
        handed: the line that ends the secrets in their pipe; empty when there are none.
    """
    process = dict(config["process"])
    of_image = dict(line.split("=", 1) for line in process.get("env", []) if "=" in line)
    reader = ["/bin/sh", "-c", _READ_SECRETS, handed] if handed else []
    process["args"] = [*process["args"][:2], *reader, *wrapped_command(spec)]  # after podman's init and its "--"
    environment = job_environment(spec, folder, of_image)
    left_out = secrets_of(spec)
    process["env"] = [f"{name}={value}" for name, value in environment.items() if name not in left_out]
    process["cwd"] = "/workspace"
    process["user"] = {**process["user"], "additionalGids": []}
    process["capabilities"] = {name: [] for name in ("bounding", "effective", "inheritable", "permitted", "ambient")}
    process["noNewPrivileges"] = True
    process["oomScoreAdj"] = _OOM_SCORE
    process["rlimits"] = [_rlimit("RLIMIT_CORE", 0)]
    if not bounded:
        process["rlimits"].append(_rlimit("RLIMIT_NPROC", processes.threads_of(uid_of(spec)) + spec.pids_limit))
    ours = [
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "nodev", "mode=1777"]},
        *(_bind(str(hold_folder(folder) / name), f"/etc/{name}", writable=False) for name in _ETC_FILES),
        *([_bind(str(hold_folder(folder) / "secrets"), _SECRETS_INSIDE, writable=False)] if handed else []),
        *(_bind(mount.source, mount.inside, mount.writable) for mount in mounts_for(spec, folder)),
    ]
    covered = {mount["destination"] for mount in ours}
    given = [mount for mount in config["mounts"] if mount["destination"] not in covered]
    linux = {**config["linux"], "seccomp": seccomp.oci_profile()}
    return {**config, "process": process, "mounts": [*given, *ours], "linux": linux}


def _run_child(output: Output, block: int, shim: int, command: Sequence[str], clean_up: Callable[[], None]) -> NoReturn:
    try:
        output.become_standard()
        guardian.guard(output, block, shim, lambda: _exec_podman(command), leaving_s=_LEAVING_S, at_last=clean_up)
    except Exception as exception:
        output.tell(exception)
    finally:
        leave()


def _exec_podman(command: Sequence[str]) -> NoReturn:
    """Ended by the guardian alone: a podman killed between two of its steps leaves half a container."""
    limit(resource.RLIMIT_CORE, 0)
    os.umask(0o022)
    os.execve(command[0], list(command), podman_environment())


@contextlib.contextmanager
def _told(output: Output) -> Iterator[None]:
    """Why podman made no container, in its own words."""
    try:
        yield
    except NoAnswer:
        said = read_present(output.err[0]) or read_to_end(output.error[0])
        raise LaunchRefused(reason_in(said) or "podman did not make the container in time") from None


def reason_in(said: str) -> str:
    """The line of podman's that says why, without the machinery before it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    return "; ".join(told or lines[-1:])


def _user(spec: AttemptSpec, image: Image) -> list[str]:
    """As outside; or as somebody of the image's, who outside is the job's own uid all the same.

    One range, because podman of version 4 cannot map an image's files in several. It ends with the job's uid, which is
    the only one in it that the job, without capabilities, can ever have.
    """
    uid = uid_of(spec)
    if image.uid is None:
        entry = "--passwd-entry=nabla:*:$UID:$GID:Nabla job:/tmp/home:/bin/sh"
        return [f"--user={uid}:{uid}", entry]
    inside, group = image.uid, image.gid or 0
    return [
        f"--uidmap=0:{uid - inside}:{inside + 1}",
        f"--gidmap=0:{uid - group}:{group + 1}",
        f"--user={inside}:{group}",
    ]


def _bind(source: str, inside: str, writable: bool) -> dict[str, Any]:
    options = ["rbind", "rprivate", "nosuid", "nodev", "rw" if writable else "ro"]
    return {"destination": inside, "type": "bind", "source": source, "options": options}


def _rlimit(kind: str, value: int) -> dict[str, Any]:
    hard = resource.getrlimit(getattr(resource, kind))[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    return {"type": kind, "hard": value, "soft": value}


def _image_of(spec: AttemptSpec) -> Image:
    if spec.image is None:
        raise LaunchRefused("there is no image to run")
    return spec.image
