"""The platform's hands on one node: runs attempts there, and finds those again that an earlier agent ran.

A plain class, so that it can be tested without Ray; `ray_agent` makes a Ray actor of it. It owns the node folder:

    attempts/<execution id>/ see attempt_folder, attempt_run and attempt_log
    tools/, fetching/        what the platform's own tools work in, see toolbox; emptied when an agent starts
    unkept/<attempt id>/     artifacts that the platform failed to keep: they stay until somebody takes them
    cache/                   workspaces by team, built environments by what went into them, downloads by team, what is
                             known of images
    images/<name>/rootfs     images that an administrator unpacked, for a node without an engine
    agent.lock               held by the living agent: two agents cannot work in one folder
    contact.json             when this node was last in contact; shims read it
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from libs.common.contracts.messages import RecordUsage, UsageRecorded
from libs.common.waiting import end
from services.executor.adapters.agent.agent_bus import AgentBus
from services.executor.adapters.agent.attempt_run import AttemptRun, Means, read_order, write_order
from services.executor.adapters.agent.folder_watch import FolderWatch
from services.executor.adapters.agent.gpus import Gpus, find_gpus
from services.executor.adapters.agent.keeping import UNKEPT
from services.executor.adapters.agent.metering import Metered, Metering
from services.executor.adapters.agent.secrets import Secrets
from services.executor.adapters.agent.unkept import bound_unkept
from services.executor.adapters.agent.zygote_keeper import ZygoteKeeper
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, MalformedSpec
from services.executor.adapters.attempts.job_spec import NodeFacts, door_of
from services.executor.adapters.attempts.shim import write_contact
from services.executor.adapters.doors.door_keeper import DoorKeeper, address_here, address_towards
from services.executor.adapters.environments.building import InstallerBuilder
from services.executor.adapters.environments.environments import Environments
from services.executor.adapters.environments.image_building import ImageBuilding
from services.executor.adapters.environments.toolbox import Toolbox
from services.executor.adapters.networks import network_host, network_probe, network_sharing
from services.executor.adapters.networks.network_probe import NetworkProbe
from services.executor.adapters.runtimes import cgroup, engine, isolation
from services.executor.adapters.runtimes.engine import Engine
from services.executor.adapters.runtimes.images import Images
from services.executor.adapters.runtimes.podman import node_label, remove_strays
from services.executor.adapters.runtimes.sandbox import IsolationProbe, find_bwrap
from services.executor.adapters.workspaces.git_source import GitSource
from services.executor.adapters.workspaces.s3_source import S3Source
from services.executor.adapters.workspaces.sealing import Sealing
from services.executor.adapters.workspaces.sources import GitAndS3
from services.executor.adapters.workspaces.staging import Staging
from services.executor.adapters.workspaces.transfer import Threads, remove_tree
from services.executor.domain.execution import ENDED
from services.executor.domain.network import FULL, INTERNET, Network, checked_policy, installation_tag
from services.executor.ports import AgentConfig, AgentView, StartOrder

LOCK_PATIENCE_S = 30.0
WALL_CHECK_S = 10.0
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
        self._door: DoorKeeper | None = None
        self._probe = IsolationProbe("process", "", "")
        self._network = Network(
            policy=checked_policy(config.job_network),
            installation=installation_tag(config.node_dir),
            subnet=config.sandbox_subnet,
            allowed=list(config.job_network_allowed),
        )
        self._network_probe = NetworkProbe(self._network.reach)
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
        await asyncio.to_thread(self._find_network)
        if self._config.door_key:
            host, key = address_towards(self._config.front_door), bytes.fromhex(self._config.door_key)
            self._door = await asyncio.to_thread(DoorKeeper, host, key, self._node_id, self._node_dir)
        if self._has_wall:  # elsewhere a network is not made, or only with a process that carries it
            warm, port = replace(self._network, policy=INTERNET), door_of(self._config.front_door)[1]
            await asyncio.to_thread(self._zygote.keep_warm, warm, [port])
        self._means = self._make_means(self._zygote)
        for path in sorted(self._attempts.iterdir()):
            if path.is_dir():
                self._take_up(AttemptFolder(path))
        if self._door:
            self._tasks["door"] = asyncio.create_task(self._door.watch())
        self._tasks["contact"] = asyncio.create_task(self._keep_contact())
        metering = Metering(self._metered, self._record_usage)
        self._tasks["metering"] = asyncio.create_task(metering.run())
        self._tasks["upkeep"] = asyncio.create_task(self._bound_unkept())
        self._tasks["wall"] = asyncio.create_task(self._keep_wall())
        self._tasks["engine"] = asyncio.create_task(self._sweep_containers(self._means.images))
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
        if self._door:
            self._door.close()
            self._door = None
        if self._zygote:
            self._zygote.end()
            self._zygote = None
        if self._lock:
            if self._has_wall:
                within_s = network_host.GOING_S if all(run.is_over for run in self._runs.values()) else 0.0
                await asyncio.to_thread(network_host.take_wall_down, self._network.installation, within_s)
            self._lock.close()
            self._lock = None

    async def start(self, order: StartOrder) -> None:
        """Commits the order and begins with it. Told again, nothing happens."""
        async with self._writing.setdefault(order.execution_id, asyncio.Lock()):
            folder = AttemptFolder(self._attempts / order.execution_id)
            if order.execution_id not in self._runs and read_order(folder) is None:
                await asyncio.to_thread(write_order, folder, order)
            self._adopt(folder)
        self._writing.pop(order.execution_id, None)

    async def stop(self, execution_id: str, grace_s: float, reason: str) -> bool:
        """Asks for the end; False for an execution unknown here, which then ends before it starts, if it comes."""
        run = self._runs.get(execution_id)
        if run:
            await asyncio.to_thread(run.stop, grace_s, reason)
            return True
        folder = AttemptFolder(self._attempts / execution_id)
        folder.path.mkdir(mode=0o700, exist_ok=True)
        await asyncio.to_thread(folder.request_stop, grace_s, reason)
        return False

    async def drop(self, execution_id: str) -> None:
        """Deletes the folder of one whose end is reported; others are left alone."""
        run = self._runs.get(execution_id)
        if run and not run.is_over:
            return
        self._runs.pop(execution_id, None)
        await asyncio.to_thread(_remove_attempt, self._attempts / execution_id)
        await asyncio.to_thread(self._forget_networks)

    async def held_order(self, execution_id: str) -> StartOrder | None:
        """For an executor whose database is older than this attempt."""
        run = self._runs.get(execution_id)
        return run.order if run else None

    async def look(self, believed: Mapping[str, str]) -> AgentView:
        """What there is, and what differs from what the executor believes. Being asked is being heard."""
        write_contact(self._contact)
        news = [run.present() for run in self._runs.values() if _is_news(run, believed)]
        return AgentView(
            isolation=self._probe.isolation,
            isolation_detail=f"{isolation.in_words(self._probe)}; {network_probe.in_words(self._network_probe)}",
            held=frozenset(self._runs),
            news=tuple(news),
            runtimes=self._means.images.runtimes if self._means else (),
            network=self._network.reach,
            gpu_model=self._gpus.model,
            gpu_memory_bytes=self._gpus.memory_bytes,
            door=self._door.address if self._door else "",
        )

    async def _sweep_containers(self, images: Images) -> None:
        """Those that nobody watches over: their shims, and whoever should have seen that, were killed."""
        found = await images.engine()
        if isinstance(found, Engine):
            label = node_label(self._node_dir)
            await asyncio.to_thread(remove_strays, list(found.command), label, self._is_alive)

    def _is_alive(self, attempt_id: str) -> bool:
        return AttemptFolder(self._attempts / attempt_id).shim_is_alive()

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
        if order is None or order.execution_id in self._runs:
            return
        assert self._means, "open comes first"
        run = AttemptRun(folder, order, self._means)
        self._runs[order.execution_id] = run
        if not run.is_over:
            self._tasks[order.execution_id] = asyncio.create_task(self._see_through(run))

    async def _see_through(self, run: AttemptRun) -> None:
        pause_s = RETRY_S
        try:
            while not run.is_over:
                try:
                    await run.run()
                except Exception:
                    log.exception("attempt is taken up again", extra={"attempt_id": run.order.execution_id})
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_RETRY_S)
        finally:
            self._tasks.pop(run.order.execution_id, None)

    @property
    def _has_wall(self) -> bool:
        return self._network.reach == FULL and os.geteuid() == 0

    def _find_network(self) -> None:
        """How far sandboxes reach here, and an end to what killed shims left of theirs."""
        self._network_probe = network_probe.probe(self._probe.isolation, self._network)
        self._network = replace(self._network, reach=self._network_probe.reach)
        self._forget_networks()

    def _forget_networks(self) -> None:
        """Gangs' alone leave anything, and only when a shim was killed."""
        folder = self._node_dir / "networks"
        if folder.is_dir():
            network_sharing.forget_the_dead(folder)
            if self._has_wall:
                network_host.close_dead_gates(self._network.installation)

    async def _keep_wall(self) -> None:
        """Others flush a host's filters: sandboxes keep their own wall, and have the host's back in a while."""
        while self._has_wall:
            await asyncio.sleep(WALL_CHECK_S)
            network = self._network
            try:
                await asyncio.to_thread(network_host.raise_wall, network.installation, network.subnet, network.allowed)
            except OSError:
                log.exception("the host's filter cannot be set up again; trying again")

    async def _keep_contact(self) -> None:
        interval_s = min(5.0, self._config.node_fence_s / 4)
        while True:
            await asyncio.sleep(interval_s)
            try:
                if await self._head_hears():
                    write_contact(self._contact)
            except Exception:  # without this loop the fence would end every job of the node
                log.exception("contact is not recorded; trying again")

    def _metered(self) -> list[Metered]:
        return [metered for run in self._runs.values() if (metered := run.metered()) is not None]

    async def _record_usage(self, message: RecordUsage, team_id: str) -> None:
        assert self._means, "open comes first"
        await self._means.bus.ask(message, UsageRecorded, team_id)

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
        node, watch, starting = self._node_facts(), FolderWatch(), Threads(STARTS_AT_ONCE, "nabla-start")

        async def start(folder: Path) -> None:
            await starting.run(zygote_process.start_attempt, folder)

        toolbox = Toolbox(node, watch, start)
        toolbox.sweep()
        git = GitSource(toolbox, self._node_dir / "fetching", config.source_hosts, config.workspace_bytes)
        sources = GitAndS3(git, S3Source(config.source_hosts, config.workspace_bytes))
        builder = InstallerBuilder(toolbox, default, cache / "downloads", config.package_hosts, config.installer)
        images = self._make_images(cache / "images")
        building = ImageBuilding(toolbox, images, cache / "builds", config.disk_reserve_bytes)
        building.sweep()
        return Means(
            bus=bus,
            secrets=Secrets(bus),
            staging=Staging(bus, cache / "workspaces", config.front_door, sources, config.workspace_bytes),
            sealing=Sealing(bus, config.front_door),
            environments=Environments(
                default,
                cache / "environments",
                hidden,
                builder,
                cache_bytes=config.environments_bytes,
                in_use=partial(environments_in_use, self._attempts),
            ),
            images=images,
            building=building,
            watch=watch,
            node=node,
            starting=starting,
            zygote=zygote_process,
            address_of=self._door.address_of if self._door else address_here,
        )

    def _make_images(self, cache: Path) -> Images:
        images = Images(
            partial(engine.find, self._config.container_runtime),
            self._node_dir / "images",
            cache,
            cache_bytes=self._config.images_bytes,
            in_use=partial(images_in_use, self._attempts),
        )
        images.sweep()
        return images

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
            log_limit_bytes=config.log_limit_bytes,
            disk_reserve_bytes=config.disk_reserve_bytes,
            network=self._network,
            gpus=self._gpus,
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


def images_in_use(attempts: Path) -> set[str]:
    """The ids of images that the attempts of a node folder run, or are about to."""
    found = set()
    for path in attempts.glob("*/spec.json"):
        if not path.with_name("exit.json").exists():
            with contextlib.suppress(MalformedSpec):
                image = AttemptFolder(path.parent).read_spec().image
                found.add(image.image if image else "")
    return found


def _is_news(run: AttemptRun, believed: Mapping[str, str]) -> bool:
    """An end that the bus has stored is no news to an executor that no longer waits for it."""
    known = believed.get(run.order.execution_id)
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
