"""Wires the executor; nothing happens before the service runs."""

from __future__ import annotations

import os

from libs.common.bus import Bus
from libs.common.inbox import Inbox
from libs.common.keyfiles import key_from
from libs.common.service import Service
from libs.common.store import Store
from libs.common.version import VERSION
from services.executor.adapters.cluster.ray_cluster import connect
from services.executor.adapters.cluster.ray_ticket import preparing
from services.executor.adapters.doors.authority import DoorAuthority
from services.executor.adapters.doors.door_tickets import FernetTickets
from services.executor.adapters.workspaces.storage import BusLogs
from services.executor.handlers import Doors
from services.executor.loops import Driver, Scaler, Sweeper, Watcher
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
    cluster = cluster or connect(settings.find_ray_address, agent_config(settings), settings.ray_namespace)
    driver = Driver(store, cluster, settings)
    watcher = Watcher(store, cluster, settings, driver.wake)
    scaler = Scaler(store, cluster, settings)
    inbox.after_commit(driver.wake)
    inbox.after_commit(scaler.wake)
    bus = Bus(NAME, settings.nats_url, settings.nats_seed(NAME))
    sweeper = Sweeper(store, cluster, BusLogs(bus), settings, driver.wake)
    return Service(
        name=NAME,
        settings=settings,
        store=store,
        bus=bus,
        inbox=inbox,
        routes=routes(preparing(settings.find_ray_address, os.environ), doors(settings)),
        loops=(driver.run, watcher.run, sweeper.run, scaler.run),
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
        nats_url=settings.nats_url,
        outer_front_door=settings.node_front_door,
        outer_nats_url=settings.node_nats_url,
        nats_seed=settings.nats_seed("agent"),
        node_fence_s=settings.node_fence_s,
        isolation=settings.isolation,
        job_network=settings.job_network,
        job_network_allowed=settings.job_network_allowed,
        sandbox_subnet=settings.sandbox_subnet,
        container_runtime=settings.container_runtime,
        environments_bytes=settings.environments_bytes,
        images_bytes=settings.images_bytes,
        workspace_bytes=settings.workspace_bytes,
        package_hosts=settings.package_hosts,
        source_hosts=settings.source_hosts,
        installer=settings.installer,
        log_limit_bytes=settings.log_limit_bytes,
        disk_reserve_bytes=settings.disk_reserve_bytes,
        unkept_bytes=settings.unkept_bytes,
        unkept_s=settings.unkept_s,
        traces=settings.traces,
        version=VERSION,
        door_key=door_key(settings).hex(),
    )


def doors(settings: ExecutorSettings) -> Doors:
    key = door_key(settings)
    return Doors(FernetTickets(key), DoorAuthority(key))


def door_key(settings: ExecutorSettings) -> bytes:
    return key_from(settings.home / "keys" / "doors.key")
