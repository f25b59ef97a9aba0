"""Class `podman`: an OCI image, run by podman in the foreground.

podman makes the container: image, file system, namespaces, seccomp, devices by CDI. What it is to run, and what of
the node it sees, this module writes into the container's configuration by a hook of podman's (`precreate`): no value
appears on a command line or in podman's database, and no path needs quoting. podman keeps that configuration on a
disk, so the values of secrets are not in it: the command's shell reads them from a pipe. (An image without a shell
has no such way: then they are in the container's own 0700 folder while it lives.) A second hook (`createRuntime`)
holds the container when its namespaces exist, so that limits and ways through the walls stand before the command
does.

The process tree is shim -> guardian -> podman, and conmon and the container come to the guardian as orphans:
whichever of them is killed, the others end, and the guardian has podman forget the container. A container whose
shim and guardian were both killed is removed by `clean_up` and `remove_strays`, which the node agent calls.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import resource
import secrets
import select
import shlex
import shutil
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

ATTEMPT_LABEL = "nabla.attempt"
NODE_LABEL = "nabla.node"
SECCOMP = "seccomp.json"

_SETUP_LIMIT_S = 120.0
_LEAVING_S = 10.0
_REMOVAL_LIMIT_S = 60.0
_REMOVALS = 5
_OOM_SCORE = 300  # when the node itself runs out, a job goes before the platform
_KILLS_BEFORE_PODMAN = 10
# What the hooks do: hand what they are given to the shim, and wait for its word. `$1` is the attempt's folder.
_ASK = 'cat > "$1/asked" && read -r go < "$1/answer" && exec cat "$1/config"'
_HOLD = 'read -r state; printf %s "$state" > "$1/held" && read -r go < "$1/go"'
_HOOKS = {"precreate": _ASK, "createRuntime": _HOLD}
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
_F_SETPIPE_SZ, _SECRETS_BYTES = 1031, 1024 * 1024
_NOT_EXECUTED = {b"No such file or directory": 127, b"Permission denied": 126}


@dataclass
class PodmanJob(Job):
    """A guardian and a held container. `root` is the container's first process, podman's small init."""

    _hold: _Hold
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
    """Runtime of class `podman`."""

    def start(
        self, spec: AttemptSpec, folder: AttemptFolder, cgroup: Cgroup | None, network: JoinedNetwork | None
    ) -> Job:
        output, block, shim = Output.open(spec.run_as_uid), os.pipe(), os.getpid()
        hold = _Hold(folder)
        for name, make in _ETC_FILES.items():
            write_readable(_hold_folder(folder) / name, make(spec))
        command = run_command(spec, folder, f"ns:{network.path}" if network else "none")
        pid = os.fork()
        if pid == 0:
            _run_child(output, block[0], shim, command, lambda: self.clean_up(spec, folder))
        output.close_childs_ends()
        os.close(block[0])
        os.write(block[1], b"\0")
        os.close(block[1])
        image = _image_of(spec)
        with _told(output):
            config = json.loads(hold.hear("asked", pid))
            handed = hold.hand_over(secrets_of(spec), uid_of(spec)) if secrets_of(spec) else ""
            hold.answer(job_config(config, spec, folder, bounded=cgroup is not None, handed=handed))
            state = json.loads(hold.hear("held", pid))
            hold.note_bundle(state["bundle"])
            root = int(state["pid"])
        if cgroup is not None:
            cgroup.add(root)
        return PodmanJob(pid, root, output.out[0], output.err[0], hold, image.has_shell)

    def clean_up(self, spec: AttemptSpec, folder: AttemptFolder) -> None:
        """podman removes a container that ended by itself; this one may have been killed with all around it."""
        for _ in range(_REMOVALS):  # conmon may have podman remove it at the same time, and one of the two fails
            if _Hold.is_forgotten(folder):
                return
            if remove_container(_image_of(spec).engine, container_of(spec.attempt_id)):
                _Hold.forget(folder)


class _NoAnswer(Exception):
    """podman has ended, or takes too long."""


class _Hold:
    """The shim's side of the hooks: pipes in the attempt's folder, which only the platform can reach."""

    def __init__(self, folder: AttemptFolder) -> None:
        self._path = _hold_folder(folder)
        write_hooks(self._path, _HOOKS)
        (self._path / SECCOMP).write_text(json.dumps(seccomp.oci_profile()))
        self._heard = {name: self._pipe(name, os.O_RDONLY | os.O_NONBLOCK) for name in ("asked", "held")}
        # Open for reading too, so that a word waits here for a hook that has not come so far.
        self._said = {name: self._pipe(name, os.O_RDWR) for name in ("answer", "go")}

    def hear(self, name: str, guard: int) -> bytes:
        """All that a hook hands over. Raises _NoAnswer when the guardian's end comes first."""
        pipe, end = self._heard.pop(name), os.pidfd_open(guard)
        heard, deadline = b"", time.monotonic() + _SETUP_LIMIT_S
        try:
            while time.monotonic() < deadline:
                ready, _, _ = select.select([pipe, end], [], [], max(0.0, deadline - time.monotonic()))
                piece = os.read(pipe, 65536) if pipe in ready else None
                if piece == b"" and heard:
                    return heard
                if piece:
                    heard += piece
                elif end in ready:
                    break
        finally:
            os.close(pipe)
            os.close(end)
        raise _NoAnswer

    def hand_over(self, values: Mapping[str, str], uid: int) -> str:
        """Have the job's shell find these in a pipe; the line that ends them. Raises OSError when they do not fit."""
        last = f"# {secrets.token_hex(16)}"
        lines = [*(f"export {name}={shlex.quote(value)}" for name, value in values.items()), last, ""]
        content = "\n".join(lines).encode("utf-8", "surrogateescape")
        self._said["secrets"] = pipe = self._pipe("secrets", os.O_RDWR | os.O_NONBLOCK)
        if os.geteuid() == 0:
            os.fchown(pipe, uid, uid)
        fcntl.fcntl(pipe, _F_SETPIPE_SZ, _SECRETS_BYTES)
        if os.write(pipe, content) < len(content):
            raise OSError("the job's secrets are too large")
        return last

    def answer(self, config: Mapping[str, Any]) -> None:
        path = self._path / "config"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(config, file)
        os.write(self._said["answer"], b"go\n")

    def note_bundle(self, bundle: str) -> None:
        """Where podman keeps the container: as long as that is there, it is not forgotten."""
        (self._path / "config").unlink(missing_ok=True)  # it holds secrets, and podman has it
        (self._path / "bundle").write_text(bundle)

    def let_go(self) -> None:
        os.write(self._said["go"], b"go\n")

    @staticmethod
    def is_forgotten(folder: AttemptFolder) -> bool:
        path = _hold_folder(folder)
        with contextlib.suppress(FileNotFoundError):
            return not Path((path / "bundle").read_text()).parent.exists()
        return not path.exists()

    @staticmethod
    def forget(folder: AttemptFolder) -> None:
        """podman has answered that there is no such container."""
        shutil.rmtree(_hold_folder(folder), ignore_errors=True)

    def _pipe(self, name: str, flags: int) -> int:
        path = self._path / name
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        return os.open(path, flags | os.O_CLOEXEC)


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


def write_hooks(path: Path, scripts: Mapping[str, str]) -> Path:
    """A folder for `--hooks-dir`: at each stage a line for sh, whose `$1` is this path."""
    hooks = path / "hooks"
    hooks.mkdir(mode=0o700, parents=True, exist_ok=True)
    for stage, script in scripts.items():
        args = ["sh", "-c", script, "sh", str(path)]
        hook = {"path": "/bin/sh", "args": args, "env": [f"PATH={SYSTEM_PATH}"]}
        text = json.dumps({"version": "1.0.0", "hook": hook, "when": {"always": True}, "stages": [stage]})
        (hooks / f"{stage}.json").write_text(text)
    return hooks


def run_command(spec: AttemptSpec, folder: AttemptFolder, network: str) -> list[str]:
    """What `podman run` is told: all that podman itself must know, and nothing of what the job is."""
    image = _image_of(spec)
    return [
        *image.engine,
        f"--hooks-dir={_hold_folder(folder) / 'hooks'}",
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
        # The engine's own profile has four hundred rules: 20 ms of a start go into them.
        f"--security-opt=seccomp={_hold_folder(folder) / SECCOMP}",
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
        *(_bind(str(_hold_folder(folder) / name), f"/etc/{name}", writable=False) for name in _ETC_FILES),
        *([_bind(str(_hold_folder(folder) / "secrets"), _SECRETS_INSIDE, writable=False)] if handed else []),
        *(_bind(mount.source, mount.inside, mount.writable) for mount in mounts_for(spec, folder)),
    ]
    covered = {mount["destination"] for mount in ours}
    given = [mount for mount in config["mounts"] if mount["destination"] not in covered]
    return {**config, "process": process, "mounts": [*given, *ours]}


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
    except _NoAnswer:
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


def _hold_folder(folder: AttemptFolder) -> Path:
    return folder.path / "podman"


def _image_of(spec: AttemptSpec) -> Image:
    if spec.image is None:
        raise LaunchRefused("there is no image to run")
    return spec.image
