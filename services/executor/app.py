"""Wires the executor; nothing happens before the service runs."""

from __future__ import annotations

from libs.common.bus import Bus
from libs.common.inbox import Inbox
from libs.common.service import Service
from libs.common.store import Store
from libs.common.version import VERSION
from services.executor.adapters.ray_cluster import RayCluster
from services.executor.adapters.storage import BusLogs
from services.executor.loops import Driver, Sweeper, Watcher
from services.executor.ports import AgentConfig, Cluster
from services.executor.routes import routes
from services.executor.settings import ExecutorSettings
from services.executor.store import SKELETON, ExecutorUnit

NAME = "executor"


def build(settings: ExecutorSettings | None = None, cluster: Cluster | None = None) -> Service:
    """The service. Tests may hand in another cluster."""
    settings = settings or ExecutorSettings()
    store = Store(settings.database_for(NAME), ExecutorUnit, SKELETON, NAME)
    inbox = Inbox(store, NAME)
    cluster = cluster or RayCluster(settings.find_ray_address, agent_config(settings), settings.ray_namespace)
    driver = Driver(store, cluster, settings)
    watcher = Watcher(store, cluster, settings, driver.wake)
    inbox.after_commit(driver.wake)
    bus = Bus(NAME, settings.nats_url, settings.nats_seed(NAME))
    sweeper = Sweeper(store, cluster, BusLogs(bus), settings, driver.wake)
    return Service(
        name=NAME,
        settings=settings,
        store=store,
        bus=bus,
        inbox=inbox,
        routes=routes(),
        loops=(driver.run, watcher.run, sweeper.run),
        describe=lambda: (True, watcher.detail),
    )


def agent_config(settings: ExecutorSettings) -> AgentConfig:
    """What node agents are told of this installation."""
    return AgentConfig(
        node_dir=str(settings.node_folder),
        default_environment=str(settings.default_environment.absolute()),
        client_folder=str(settings.client_folder.absolute()),
        storage_root=str(settings.storage_folder),
        front_door=settings.front_door,
        nats_url=settings.node_nats_url or settings.nats_url,
        nats_seed=settings.nats_seed("agent"),
        node_fence_s=settings.node_fence_s,
        isolation=settings.isolation,
        container_runtime=settings.container_runtime,
        environments_bytes=settings.environments_bytes,
        images_bytes=settings.images_bytes,
        traces=settings.traces,
        version=VERSION,
    )
