"""The platform's hands on one node: runs attempts there, and finds those again that an earlier agent ran.

A plain class, so that it can be tested without Ray; `ray_agent` makes a Ray actor of it. It owns the node folder:

    attempts/<attempt id>/   see attempt_folder, attempt_run and attempt_log
    unkept/<attempt id>/     artifacts that the platform failed to keep: they stay until somebody takes them
    cache/                   workspaces by team and file set, built environments by their requirements
    agent.lock               held by the living agent: two agents cannot work in one folder
    contact.json             when this node was last in contact; shims read it
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO

from libs.common.waiting import end
from services.executor.adapters import cgroup, isolation
from services.executor.adapters.agent_bus import AgentBus
from services.executor.adapters.attempt_folder import AttemptFolder, MalformedSpec
from services.executor.adapters.attempt_run import AttemptRun, Means, read_order, write_order
from services.executor.adapters.environments import Environments
from services.executor.adapters.folder_watch import FolderWatch
from services.executor.adapters.gpus import Gpus, find_gpus
from services.executor.adapters.job_spec import NodeFacts
from services.executor.adapters.keeping import UNKEPT
from services.executor.adapters.sandbox import IsolationProbe, find_bwrap
from services.executor.adapters.sealing import Sealing
from services.executor.adapters.shim import write_contact
from services.executor.adapters.staging import Staging
from services.executor.adapters.transfer import Threads, remove_tree
from services.executor.adapters.unkept import bound_unkept
from services.executor.adapters.zygote_keeper import ZygoteKeeper
from services.executor.domain.execution import ENDED
from services.executor.ports import AgentConfig, AgentView, StartOrder

LOCK_PATIENCE_S = 30.0
RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
STARTS_AT_ONCE = 4
UPKEEP_S = 3600.0

log = logging.getLogger(__name__)
HeadHears = Callable[[], Awaitable[bool]]


class NodeAgent:
    """Runs attempts on this node.

    Args:
        head_hears: asks whether the cluster's head is in contact with this node.
    """

    def __init__(self, node_id: str, config: AgentConfig, head_hears: HeadHears) -> None:
        self._node_id = node_id
        self._config = config
        self._head_hears = head_hears
        self._node_dir = Path(config.node_dir)
        self._attempts = self._node_dir / "attempts"
        self._contact = self._node_dir / "contact.json"
        self._runs: dict[str, AttemptRun] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._writing: dict[str, asyncio.Lock] = {}
        self._zygote: ZygoteKeeper | None = None
        self._lock: IO[str] | None = None
        self._means: Means | None = None
        self._probe = IsolationProbe("process", "", "")
        self._gpus = Gpus()

    async def open(self) -> None:
        """Takes the node folder over, and goes on with every attempt in it. May be tried again when it failed."""
        try:
            await self._open()
        except BaseException:
            await self.close()
            self._runs.clear()
            raise

    async def _open(self) -> None:
        self._attempts.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Jobs run as other users where the platform is root: they pass through to their own folders.
        self._node_dir.chmod(0o711)
        self._attempts.chmod(0o711)
        self._lock = await _take_lock(self._node_dir / "agent.lock")
        write_contact(self._contact)
        self._zygote = ZygoteKeeper(self._node_dir)
        self._probe, self._gpus = await asyncio.gather(
            asyncio.to_thread(isolation.probe, self._config.isolation), asyncio.to_thread(find_gpus)
        )
        self._means = self._make_means(self._zygote)
        for path in sorted(self._attempts.iterdir()):
            if path.is_dir():
                self._take_up(AttemptFolder(path))
        self._tasks["contact"] = asyncio.create_task(self._keep_contact())
        self._tasks["upkeep"] = asyncio.create_task(self._bound_unkept())
        log.info("agent is ready", extra={"attempts": len(self._runs), "isolation": self._probe.isolation})

    async def close(self) -> None:
        """Leaves; attempts run on, and the next agent finds them."""
        tasks, self._tasks = list(self._tasks.values()), {}
        await end(tasks, again_s=1.0)
        if self._means:
            self._means.watch.close()
            self._means.staging.close()
            self._means.sealing.close()
            self._means.starting.close()
            await self._means.bus.close()
            self._means = None
        if self._zygote:
            self._zygote.end()
            self._zygote = None
        if self._lock:
            self._lock.close()
            self._lock = None

    async def start(self, order: StartOrder) -> None:
        """Commits the order and begins with it. Told again, nothing happens."""
        async with self._writing.setdefault(order.attempt_id, asyncio.Lock()):
            folder = AttemptFolder(self._attempts / order.attempt_id)
            if order.attempt_id not in self._runs and read_order(folder) is None:
                await asyncio.to_thread(write_order, folder, order)
            self._adopt(folder)
        self._writing.pop(order.attempt_id, None)

    async def stop(self, attempt_id: str, grace_s: float, reason: str) -> bool:
        """Asks for the end; False for an attempt unknown here, which then ends before it starts, if it comes."""
        run = self._runs.get(attempt_id)
        if run:
            await asyncio.to_thread(run.stop, grace_s, reason)
            return True
        folder = AttemptFolder(self._attempts / attempt_id)
        folder.path.mkdir(mode=0o700, exist_ok=True)
        await asyncio.to_thread(folder.request_stop, grace_s, reason)
        return False

    async def drop(self, attempt_id: str) -> None:
        """Deletes the folder of an attempt whose end is reported; others are left alone."""
        run = self._runs.get(attempt_id)
        if run and not run.is_over:
            return
        self._runs.pop(attempt_id, None)
        await asyncio.to_thread(_remove_attempt, self._attempts / attempt_id)

    async def held_order(self, attempt_id: str) -> StartOrder | None:
        """For an executor whose database is older than this attempt."""
        run = self._runs.get(attempt_id)
        return run.order if run else None

    async def look(self, believed: Mapping[str, str]) -> AgentView:
        """What there is, and what differs from what the executor believes. Being asked is being heard."""
        write_contact(self._contact)
        news = [run.present() for run in self._runs.values() if _is_news(run, believed)]
        detail = isolation.in_words(self._probe)
        return AgentView(
            self._probe.isolation,
            detail,
            frozenset(self._runs),
            tuple(news),
            gpu_model=self._gpus.model,
            gpu_memory_bytes=self._gpus.memory_bytes,
        )

    def _take_up(self, folder: AttemptFolder) -> None:
        """One attempt whose records a crash or another version spoiled must not keep the others from going on.

        It is not among those that this agent holds, so it counts as lost, and must not run on.
        """
        try:
            self._adopt(folder)
        except (ValueError, KeyError, TypeError):
            log.exception("attempt cannot be taken up; it is ended", extra={"attempt_id": folder.path.name})
            with contextlib.suppress(ValueError, TypeError):
                folder.request_stop(0.0, "its records on the node cannot be read")

    def _adopt(self, folder: AttemptFolder) -> None:
        order = read_order(folder)
        if order is None or order.attempt_id in self._runs:
            return
        assert self._means, "open comes first"
        run = AttemptRun(folder, order, self._means)
        self._runs[order.attempt_id] = run
        if not run.is_over:
            self._tasks[order.attempt_id] = asyncio.create_task(self._see_through(run))

    async def _see_through(self, run: AttemptRun) -> None:
        pause_s = RETRY_S
        try:
            while not run.is_over:
                try:
                    await run.run()
                except Exception:
                    log.exception("attempt is taken up again", extra={"attempt_id": run.order.attempt_id})
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_RETRY_S)
        finally:
            self._tasks.pop(run.order.attempt_id, None)

    async def _keep_contact(self) -> None:
        interval_s = min(5.0, self._config.node_fence_s / 4)
        while True:
            await asyncio.sleep(interval_s)
            try:
                if await self._head_hears():
                    write_contact(self._contact)
            except Exception:  # without this loop the fence would end every job of the node
                log.exception("contact is not recorded; trying again")

    async def _bound_unkept(self) -> None:
        config, folder = self._config, self._node_dir / UNKEPT
        while True:
            try:
                await asyncio.to_thread(bound_unkept, folder, config.unkept_bytes, config.unkept_s, time.time())
            except OSError:
                log.exception("what was not kept is not looked through; trying again")
            await asyncio.sleep(UPKEEP_S)

    def _make_means(self, zygote_process: ZygoteKeeper) -> Means:
        config = self._config
        bus = AgentBus(config.nats_url, config.nats_seed)
        cache = self._node_dir / "cache"
        default = Path(config.default_environment)
        hidden = (self._node_dir, Path(config.storage_root))
        return Means(
            bus=bus,
            staging=Staging(bus, cache / "workspaces", config.front_door),
            sealing=Sealing(bus, config.front_door),
            environments=Environments(
                default,
                cache / "environments",
                hidden,
                config.environments_bytes,
                partial(environments_in_use, self._attempts),
            ),
            watch=FolderWatch(),
            node=self._node_facts(),
            starting=Threads(STARTS_AT_ONCE, "nabla-start"),
            zygote=zygote_process,
        )

    def _node_facts(self) -> NodeFacts:
        config = self._config
        return NodeFacts(
            node_id=self._node_id,
            hostname=socket.gethostname(),
            node_dir=self._node_dir,
            storage_root=Path(config.storage_root),
            client_folder=Path(config.client_folder),
            front_door=config.front_door,
            isolation=self._probe.isolation,
            isolation_detail=isolation.in_words(self._probe),
            bwrap_path=find_bwrap(isolation.wheel_bwrap()) or "/usr/bin/bwrap",
            contact_file=self._contact,
            fence_s=config.node_fence_s,
        )


def stop_all(node_dir: Path, grace_s: float, reason: str) -> int:
    """Asks every living attempt of a node folder for its end; how many there were. For taking a node down."""
    folders = [AttemptFolder(path) for path in (node_dir / "attempts").glob("*")]
    living = [folder for folder in folders if folder.shim_is_alive()]
    for folder in living:
        folder.request_stop(grace_s, reason)
    return len(living)


def environments_in_use(attempts: Path) -> set[str]:
    """The prefixes that the attempts of a node folder run with, or are about to."""
    found = set()
    for path in attempts.glob("*/spec.json"):
        if not path.with_name("exit.json").exists():
            with contextlib.suppress(MalformedSpec):
                found.add(AttemptFolder(path.parent).read_spec().environment_prefix or "")
    return found


def _is_news(run: AttemptRun, believed: Mapping[str, str]) -> bool:
    """An end that the bus has stored is no news to an executor that no longer waits for it."""
    known = believed.get(run.order.attempt_id)
    return run.phase != ENDED if known is None else run.phase != known


async def _take_lock(path: Path) -> IO[str]:
    """Waits for an earlier agent to be gone: its process may outlive its actor by moments."""
    file = path.open("a")
    deadline = asyncio.get_running_loop().time() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if asyncio.get_running_loop().time() > deadline:
                file.close()
                raise
            await asyncio.sleep(0.05)
        else:
            return file


def _remove_attempt(path: Path) -> None:
    """The order goes last: half a folder still says whose it is, and is dropped again."""
    if not path.is_dir():
        return
    cgroup.remove_leftover(path.name)  # of a shim that was killed
    for entry in list(path.iterdir()):
        if entry.name not in ("order.json", "reported.json"):
            remove_tree(entry)
    remove_tree(path)
