"""The folder of one attempt on its node: all that the node agent and the shim ever tell each other.

`<node_dir>/attempts/<attempt_id>/` (0700) outlives the agent, the zygote, Ray and the shim itself, so whoever
restarts reads here what happened. Every record is replaced whole (written beside, synced, renamed, folder
synced): a reader sees the old one or the new one, never half of one, and a power cut cannot take it back.

    spec.json     what to run; written by the agent before anything is started
    lock          held by the living shim: two shims cannot run one attempt
    reserve       room on the disk: a job that filled it can still be stopped, and its end still be said
    shim.json     which process is the shim; durable before the user's command exists
    started.json  the command was let go
    stop.json     the agent asks for the end; the soonest deadline of several counts
    exit.json     the end; the last thing that the shim writes
    unfinished    the lines that the command has not ended, as they look now; a hint, and never synced
    shim.log      what the shim itself had to say (tracebacks); empty in health
    workspace/ artifacts/ tmp/ spool/
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from services.executor.adapters.attempts import processes
from services.executor.domain.network import Gang, MalformedNetwork, Network

# build: a sandbox with users of its own, root among them, for the platform's builds of images; no job has it.
Isolation = Literal["bwrap", "process", "podman", "build"]
ExitReason = Literal["exited", "stopped", "timed_out", "out_of_memory", "fenced", "refused", "start_failure"]

WAKE = signal.SIGURG  # ignored by default: it cannot end a shim that does not listen for it yet

_ATTEMPT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")  # also the sandbox's host name
_RESERVE_BYTES = 64 * 1024
_UNFINISHED_SHOWN = 1000  # characters of a line that is not ended
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class MalformedSpec(ValueError):
    """spec.json cannot be run; the text says which field and why, for the user to read."""


class Bind(NamedTuple):
    """A path of the host shown at a path inside the sandbox."""

    host: str
    inside: str


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """127.0.0.1:listen_port inside the sandbox leads to target_host:target_port as the node sees it."""

    listen_port: int
    target_host: str
    target_port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """What a job has for its system in place of the node's own.

    Args:
        image: an engine's id of the image; for bwrap the folder of an unpacked one.
        name: as the user knows it.
        engine: the command that reaches the engine, with its global options.
        uid, gid: as whom the job runs inside; None: as outside. Outside it is always `run_as_uid`.
        options: what `run` needs on this node.
        has_shell: whether the image has a /bin/sh.
        devices: CDI names of the devices that the job is given.
    """

    image: str
    name: str = ""
    engine: list[str] = field(default_factory=list)
    uid: int | None = None
    gid: int | None = None
    options: list[str] = field(default_factory=list)
    has_shell: bool = True
    devices: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptSpec:
    """What to run and within which bounds.

    `secret_env` names, for each further variable, the secret whose value the shim is handed in memory.

    `command` is an argv, or one string for `sh -c`. `environment_prefix` is a virtualenv (or any prefix with
    a bin/) shown read-only at its own path and put first on PATH. `pids_limit` bounds the processes and
    threads of the attempt. `gpu_indices` are the node's own numbers, `gpu_devices` their device
    nodes in the same order, none for GPUs that Ray was only told of. `run_as_uid` is required when the
    platform is root.
    """

    attempt_id: str
    job_id: str
    command: list[str] | str
    env: dict[str, str] = field(default_factory=dict)
    secret_env: dict[str, str] = field(default_factory=dict)
    cpu_count: float = 1.0
    memory_bytes: int | None = None
    gpu_indices: list[int] = field(default_factory=list)
    gpu_devices: list[str] = field(default_factory=list)
    isolation: Isolation = "bwrap"
    image: Image | None = None
    run_as_uid: int | None = None
    timeout_s: float | None = None
    stop_grace_s: float = 15.0
    binds_ro: list[Bind] = field(default_factory=list)
    binds_rw: list[Bind] = field(default_factory=list)
    workspace_path: str | None = None
    artifacts_path: str | None = None
    environment_prefix: str | None = None
    front_door: list[FrontDoor] = field(default_factory=list)
    expose_ports: list[int] = field(default_factory=list)
    pids_limit: int = 4096
    log_limit_bytes: int = 10_000_000_000
    disk_reserve_bytes: int = 0
    node_contact_file: str | None = None
    node_fence_s: float = 120.0
    bwrap_path: str = "/usr/bin/bwrap"
    network: Network = field(default_factory=Network)

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise MalformedSpec(problem)

    @property
    def is_walled(self) -> bool:
        """Has it a file system and a network of its own?"""
        return self.isolation != "process"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Raises MalformedSpec. Unknown fields are ignored, so a newer agent can talk to an older shim."""
        try:
            raw = json.loads(text)
            known = {f.name for f in dataclasses.fields(cls)}
            values = {name: value for name, value in raw.items() if name in known}
            for name in ("binds_ro", "binds_rw"):
                values[name] = [Bind(*pair) for pair in values.get(name, [])]
            if values.get("image") is not None:
                values["image"] = Image(**values["image"])
            values["front_door"] = [FrontDoor(**door) for door in values.get("front_door", [])]
            if "network" in values:
                gang = values["network"].get("gang")
                values["network"] = Network(**values["network"] | {"gang": Gang(**gang) if gang else None})
            return cls(**values)
        except MalformedSpec:
            raise
        except MalformedNetwork as error:
            raise MalformedSpec(str(error)) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise MalformedSpec(f"the spec is not readable: {error}") from None


@dataclass(frozen=True, slots=True)
class ShimRecord:
    """Which process is the shim. A pid alone lies after reuse or a reboot; with these two it cannot."""

    pid: int
    start_ticks: int
    boot_id: str

    def is_alive(self) -> bool:
        return self.boot_id == processes.boot_id() and processes.start_ticks(self.pid) == self.start_ticks


@dataclass(frozen=True, slots=True)
class StartedRecord:
    """The command runs: `pid` is the node's number of the job's init, `ports` maps container to host port."""

    pid: int
    at_us: int
    isolation: Isolation
    ports: dict[int, int]


@dataclass(frozen=True, slots=True)
class StopRecord:
    grace_s: float
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitRecord:
    """The end. `code` is 128+signal for a command that a signal ended, None where none was ever started."""

    code: int | None
    signal: int | None
    reason: ExitReason
    detail: str
    peak_rss_bytes: int
    started_at_us: int | None
    ended_at_us: int


class AttemptFolder:
    """Reads and writes the records of one attempt. A record that is not there yet reads as None."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.workspace = self.path / "workspace"
        self.artifacts = self.path / "artifacts"
        self.tmp = self.path / "tmp"
        self.spool = self.path / "spool"
        self.log = self.path / "shim.log"

    @classmethod
    def create(cls, node_dir: str | os.PathLike[str], spec: AttemptSpec) -> Self:
        """Make the folder and commit the spec. Repeating it changes nothing: the first spec stays."""
        folder = cls(Path(node_dir) / "attempts" / spec.attempt_id)
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        for path in (folder.path, folder.workspace, folder.artifacts, folder.tmp, folder.spool):
            path.mkdir(mode=0o700, exist_ok=True)
        if not (folder.path / "spec.json").exists():
            _reserve(folder.path / "reserve")
            folder._write("spec.json", dataclasses.asdict(spec))
            _sync_folder(folder.path.parent)
        return folder

    def read_spec(self) -> AttemptSpec:
        """Raises MalformedSpec, also when there is no spec at all."""
        try:
            return AttemptSpec.from_json((self.path / "spec.json").read_bytes())
        except OSError as error:
            raise MalformedSpec(f"the spec is not readable: {error}") from None

    def read_shim(self) -> ShimRecord | None:
        raw = self._read("shim.json")
        return None if raw is None else ShimRecord(**raw)

    def write_shim(self, record: ShimRecord) -> None:
        self._write("shim.json", dataclasses.asdict(record))

    def read_started(self) -> StartedRecord | None:
        raw = self._read("started.json")
        if raw is None:
            return None
        return StartedRecord(**raw | {"ports": {int(inside): host for inside, host in raw["ports"].items()}})

    def write_started(self, record: StartedRecord) -> None:
        self._write("started.json", dataclasses.asdict(record))

    def read_stop(self) -> StopRecord | None:
        raw = self._read("stop.json")
        return None if raw is None else StopRecord(**raw)

    def request_stop(self, grace_s: float, reason: str) -> None:
        """Ask for the end. Holds before the start too: such an attempt never runs. Repeating it is
        harmless.
        """
        self._write("stop.json", dataclasses.asdict(StopRecord(grace_s, reason)))
        record = self.read_shim()
        if record is not None and record.is_alive():
            with suppress(ProcessLookupError):
                os.kill(record.pid, WAKE)

    def read_exit(self) -> ExitRecord | None:
        raw = self._read("exit.json")
        return None if raw is None else ExitRecord(**raw)

    def write_exit(self, record: ExitRecord) -> None:
        self._write("exit.json", dataclasses.asdict(record))

    def read_unfinished(self) -> dict[str, str]:
        """Stream -> what it shows on a line that is not ended. Half of a record reads as nothing."""
        try:
            loaded: dict[str, str] = json.loads((self.path / "unfinished").read_bytes())
        except (OSError, ValueError):
            return {}
        return loaded

    def write_unfinished(self, texts: Mapping[str, str]) -> None:
        """In place, so that a full disk takes nothing but the hint; the last characters of a long line."""
        content = json.dumps({stream: text[-_UNFINISHED_SHOWN:] for stream, text in texts.items()}).encode()
        with suppress(OSError):
            (self.path / "unfinished").write_bytes(content)

    def shim_is_alive(self) -> bool:
        """False with no exit.json beside it means that the shim was killed, and its sandbox with it."""
        record = self.read_shim()
        return record is not None and record.is_alive()

    @contextmanager
    def try_lock(self) -> Iterator[int | None]:
        """The lock's descriptor, or None while another process holds it.

        flock belongs to the open file: a shim forked under the lock keeps it by keeping its copy of the
        descriptor, until it dies, however it dies.
        """
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield descriptor if _flock(descriptor) else None
        finally:
            os.close(descriptor)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            loaded: dict[str, Any] = json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        return loaded

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        content = json.dumps(value).encode()
        try:
            write_durably(self.path / name, content)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            (self.path / "reserve").unlink(missing_ok=True)
            write_durably(self.path / name, content)


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file whole: readers see the old or the new content, and so do they after a power cut."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:  # writes all of it: a nearly full disk takes only the beginning
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _reserve(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, _RESERVE_BYTES)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _problems(spec: AttemptSpec) -> Iterator[str]:
    yield from _command_problems(spec)
    yield from _environment_problems(spec)
    yield from _number_problems(spec)
    yield from _path_problems(spec)
    if spec.isolation not in get_args(Isolation):
        yield f"isolation is {spec.isolation!r}, not one of {', '.join(get_args(Isolation))}"
    yield from _image_problems(spec)


def _command_problems(spec: AttemptSpec) -> Iterator[str]:
    if not _matches(_ATTEMPT_ID, spec.attempt_id):
        yield f"attempt_id {spec.attempt_id!r} is not lower-case letters, digits and dashes, 63 at most"
    words = spec.command if isinstance(spec.command, list) else [spec.command]
    if not words or not all(_is_text(word) for word in words) or not words[0]:
        yield "command is neither a line for sh nor a list of words, or holds a NUL"


def _environment_problems(spec: AttemptSpec) -> Iterator[str]:
    for name, value in (*spec.env.items(), *spec.secret_env.items()):
        if not _matches(_ENVIRONMENT_NAME, name):
            yield f"env has the name {name!r}, which no shell can read"
        if not _is_text(value):
            yield f"env {name} is not a text without NUL"


def _image_problems(spec: AttemptSpec) -> Iterator[str]:
    image = spec.image
    if image is None:
        if spec.isolation == "podman":
            yield "isolation is 'podman', which runs images, and there is none"
        return
    words = [image.image, *image.engine, *image.options, *image.devices]
    if not image.image or image.image.startswith("-") or not all(_is_text(word) for word in words):
        yield f"image {image.image!r} is not one"
    if spec.isolation == "process":
        yield "an image cannot be run in class process"
    if spec.isolation == "bwrap" and not os.path.isabs(image.image):
        yield f"the unpacked image {image.image!r} is not an absolute path"
    for number in (image.uid, image.gid):
        if number is not None and not _is_whole(number, 0):
            yield "a user of the image is not a number from 0"


def _number_problems(spec: AttemptSpec) -> Iterator[str]:
    for name in ("cpu_count", "node_fence_s"):
        if not _is_positive(getattr(spec, name)):
            yield f"{name} is not a number above 0"
    for name in ("memory_bytes", "timeout_s"):
        if getattr(spec, name) is not None and not _is_positive(getattr(spec, name)):
            yield f"{name} is not a number above 0"
    if spec.stop_grace_s != 0 and not _is_positive(spec.stop_grace_s):
        yield "stop_grace_s is not a number from 0"
    if not _is_whole(spec.pids_limit, 1):
        yield "pids_limit is not a whole number above 0"
    if not _is_whole(spec.log_limit_bytes, 0) or not _is_whole(spec.disk_reserve_bytes, 0):
        yield "log_limit_bytes or disk_reserve_bytes is not a whole number from 0"
    # Without walls root may be the only user who can reach what the job needs.
    if spec.run_as_uid is not None and not _is_whole(spec.run_as_uid, 0 if spec.isolation == "process" else 1):
        yield "run_as_uid is not the number of an ordinary user"
    if not all(_is_whole(index, 0) for index in spec.gpu_indices):
        yield "gpu_indices are not numbers of GPUs"
    if spec.gpu_devices and len(spec.gpu_devices) != len(spec.gpu_indices):
        yield "gpu_devices are not those of the gpu_indices"
    ports = [*spec.expose_ports, *(p for d in spec.front_door for p in (d.listen_port, d.target_port))]
    if not all(_is_whole(port, 1) and port < 65536 for port in ports):
        yield "a port is not between 1 and 65535"


def _path_problems(spec: AttemptSpec) -> Iterator[str]:
    given = [spec.workspace_path, spec.artifacts_path, spec.environment_prefix, spec.node_contact_file]
    inside = [bind.inside for bind in (*spec.binds_ro, *spec.binds_rw)]
    host = [bind.host for bind in (*spec.binds_ro, *spec.binds_rw)]
    for path in [*(p for p in given if p is not None), *inside, *host, *spec.gpu_devices, spec.bwrap_path]:
        if not _is_text(path) or not os.path.isabs(path) or ".." in path.split("/"):
            yield f"{path!r} is not an absolute path without '..'"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
