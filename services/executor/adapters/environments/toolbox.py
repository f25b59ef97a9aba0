"""Runs the platform's own tools (installers, git) on what users ask for, behind the walls that jobs have.

Building a package runs its code, and git reads what a stranger's server sends. So a tool is run as an attempt is, by
a shim: as a user of its own, with a root put together from read-only parts, a clean environment, and only the folders
it is to fill writable. It reaches the places that the call names, through a gate (see `reach`), and nothing else; in
class `process` there are no walls, as for jobs.

A tool's folder is not an attempt's: it lies in `tools/`, is nobody's to report, and goes with the tool. What an
earlier agent left there is ended first of all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from libs.common.errors import NablaError
from libs.common.waiting import happens
from services.executor.adapters.agent.folder_watch import FolderWatch
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec, Bind, ExitRecord, FrontDoor
from services.executor.adapters.attempts.job_spec import NodeFacts
from services.executor.adapters.attempts.launch import end_strays
from services.executor.adapters.attempts.spool import SpoolReader
from services.executor.adapters.networks.reach import Gate, Place
from services.executor.adapters.runtimes import cgroup
from services.executor.adapters.runtimes.isolation import PROBE_UID, closed_to
from services.executor.adapters.workspaces.transfer import remove_tree
from services.executor.domain.network import Network

LAST_LINES = 20
LOOK_S = 1.0
END_S = 20.0
# Inside a sandbox, where nothing else listens.
GATE_PORT = 3128
Tell = Callable[[str], None]


class ToolFailed(NablaError):
    """The tool did not do it; the text is what it said last, for the user to read."""


class ToolStopped(NablaError):
    """The tool was ended: the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AsBuilder:
    """For a tool that is root among users of its own (see `build_sandbox`), within the limits of the job it works for.

    Args:
        first_uid: outside, of its range of users.
        network: as the job's.
    """

    first_uid: int
    cpu_count: float
    memory_bytes: int | None
    network: Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A program to run.

    Args:
        files: texts for the tool alone, in the folder that its variable TOOL_FILES names; they go with it, and are in
            no record. A name that ends in .sh can be executed.
        writable, readable: paths of the node, shown at the same path inside; the former are given to the tool's user.
        prefix: a Python environment to show, whose `bin` comes first on the PATH.
        check: looked at every second; a text that it answers ends the tool, with this text as the reason.
    """

    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict, repr=False)
    writable: tuple[Path, ...] = ()
    readable: tuple[Path, ...] = ()
    prefix: str | None = None
    places: tuple[Place, ...] = ()
    limit_s: float = 600.0
    builder: AsBuilder | None = None
    check: Callable[[], str] = lambda: ""


class Toolbox:
    """The tools of one node.

    Args:
        start: has a zygote start the shim of a folder.
    """

    def __init__(self, node: NodeFacts, watch: FolderWatch, start: Callable[[Path], Awaitable[None]]) -> None:
        self._node = node
        self._watch = watch
        self._start = start
        self._root = node.node_dir / "tools"
        self._fetching = node.node_dir / "fetching"
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def walled(self) -> bool:
        """Whether a tool may run code that came from elsewhere."""
        return self._node.isolation == "bwrap"

    def sweep(self) -> None:
        """Ends and removes what an earlier agent left. Blocks; call it before the first `run`."""
        for path in (self._root / "attempts").glob("*"):
            _kill(AttemptFolder(path))
            remove_tree(path)
        if self._fetching.exists():
            remove_tree(self._fetching)

    async def run(self, tool: Tool, tell: Tell = lambda line: None) -> list[str]:
        """Runs the tool to its end, telling each line as it comes; its last lines.

        Raises:
            ToolFailed, ToolStopped; OSError; what the zygote raises.
        """
        gate = Gate(tool.places)
        with gate.opened() if tool.places else contextlib.nullcontext(gate):
            folder = await asyncio.to_thread(self._prepare, tool, gate.port)
            changed = asyncio.Event()
            self._watch.watch(folder.path, changed)
            self._watch.watch(folder.spool, changed)
            output = _Output(folder, tell)
            try:
                await self._start(folder.path)
                ended = await self._until_ended(folder, tool, changed, output)
            finally:
                self._watch.forget(changed)
                ending = asyncio.create_task(asyncio.to_thread(_end, folder))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)
                await asyncio.shield(ending)
        if ended.code:
            raise ToolFailed("\n".join([*output.last, *gate.refused]) or f"exit code {ended.code}")
        return list(output.last)

    async def _until_ended(
        self, folder: AttemptFolder, tool: Tool, changed: asyncio.Event, output: _Output
    ) -> ExitRecord:
        while True:
            changed.clear()
            ended = folder.read_exit()
            output.read()
            if ended:
                if ended.code is None or ended.reason != "exited":
                    raise ToolStopped(ended.detail or ended.reason)
                return ended
            if folder.read_shim() and not folder.shim_is_alive() and folder.read_exit() is None:
                raise ToolStopped("the process that watched over it was killed")
            reason = await asyncio.to_thread(tool.check)
            if reason:
                raise ToolStopped(reason)
            await happens(changed, LOOK_S)

    def _prepare(self, tool: Tool, gate_port: int) -> AttemptFolder:
        node = self._node
        uid = self._uid(tool)
        for path in tool.writable:
            path.mkdir(parents=True, exist_ok=True)
            if uid:
                _give(path, uid)
        self._root.mkdir(mode=0o711, exist_ok=True)
        door = f"http://127.0.0.1:{GATE_PORT if self.walled else gate_port}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), door) if gate_port else {}
        spec = AttemptSpec(
            attempt_id=f"tool-{uuid.uuid4().hex[:20]}",
            job_id="tool",
            command=tool.command,
            env=proxies | tool.env | {"TOOL_FILES": "/tmp/files"},
            isolation=node.isolation,
            run_as_uid=uid,
            timeout_s=tool.limit_s,
            stop_grace_s=0.0,
            binds_ro=[Bind(str(path), str(path)) for path in tool.readable] if self.walled else [],
            binds_rw=[Bind(str(path), str(path)) for path in tool.writable] if self.walled else [],
            environment_prefix=tool.prefix,
            front_door=[FrontDoor(GATE_PORT, "127.0.0.1", gate_port)] if gate_port and self.walled else [],
            node_contact_file=str(node.contact_file),
            node_fence_s=node.fence_s,
            bwrap_path=node.bwrap_path,
        )
        if tool.builder:
            spec = _for_builder(spec, tool.builder)
        if not self.walled:
            spec.env["TOOL_FILES"] = str(self._root / "attempts" / spec.attempt_id / "tmp" / "files")
        folder = AttemptFolder.create(self._root, spec)
        (self._root / "attempts").chmod(0o711)
        for name, text in tool.files.items():
            _write_private(folder.tmp / "files" / name, text)
        return folder

    def _uid(self, tool: Tool) -> int | None:
        """A user that no team has, where the platform is root; without walls only where it can get in."""
        if tool.builder:
            return tool.builder.first_uid
        if os.geteuid() != 0:
            return None
        paths = [*tool.writable, *tool.readable, *([Path(tool.prefix)] if tool.prefix else []), self._node.node_dir]
        return 0 if not self.walled and closed_to(PROBE_UID, paths) else PROBE_UID


def _for_builder(spec: AttemptSpec, builder: AsBuilder) -> AttemptSpec:
    bounds = {"cpu_count": builder.cpu_count, "memory_bytes": builder.memory_bytes, "network": builder.network}
    return replace(spec, isolation="build", **bounds)  # type: ignore[arg-type]


class _Output:
    """What a tool says: each line once, progress bars as their last state."""

    def __init__(self, folder: AttemptFolder, tell: Tell) -> None:
        self._reader = SpoolReader(folder.spool)
        self._tell = tell
        self._next = 0
        self.last: deque[str] = deque(maxlen=LAST_LINES)

    def read(self) -> None:
        while lines := self._reader.read_from(self._next):
            self._next = lines[-1].number + 1
            for line in lines:
                text = line.text.rstrip("\r").rpartition("\r")[2].strip()
                if text:
                    self.last.append(text)
                    self._tell(text)


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o700 if path.suffix == ".sh" else 0o600), "w") as file:
        file.write(text)


def _give(path: Path, uid: int) -> None:
    os.chown(path, uid, uid)


def _end(folder: AttemptFolder) -> None:
    """Ends the tool if it still runs, and removes its folder."""
    if folder.read_exit() is None:
        folder.request_stop(0.0, "no longer wanted")  # also before the shim is there: it runs nothing then
    record = folder.read_shim()
    if record is not None and _outlives(record.is_alive, END_S):
        _kill(folder)
    cgroup.remove_leftover(folder.path.name)  # of a shim that somebody else killed
    remove_tree(folder.path)


def _kill(folder: AttemptFolder) -> None:
    record = folder.read_shim()
    if record is not None and record.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGKILL)
        _outlives(record.is_alive, END_S)
    end_strays(folder)


def _outlives(is_alive: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while is_alive():
        if time.monotonic() > deadline:
            return True
        time.sleep(0.005)
    return False
