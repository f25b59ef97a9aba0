"""The scheduler, put together."""

from __future__ import annotations

from libs.common.bus import Bus
from libs.common.inbox import Inbox
from libs.common.service import Service
from services.scheduler.adapters.executor import BusExecutor
from services.scheduler.adapters.machine_file import MachineFile
from services.scheduler.adapters.registry import BusRegistry
from services.scheduler.loops.placer import Placer
from services.scheduler.loops.reconciler import Patience, Reconciler
from services.scheduler.routes import routes
from services.scheduler.settings import SchedulerSettings
from services.scheduler.store import SchedulerStore


def build(settings: SchedulerSettings | None = None) -> Service:
    settings = settings or SchedulerSettings()
    machines = MachineFile(settings.home / settings.machines_file)
    store = SchedulerStore(settings.database_for("scheduler"), machine_types=machines)
    bus = Bus("scheduler", settings.nats_url, settings.nats_seed("scheduler"))
    placer = Placer(store, silent_s=settings.executor_silent_s, pass_s=settings.reconcile_s)
    patience = Patience(
        pass_s=settings.reconcile_s,
        silent_s=settings.executor_silent_s,
        attempt_s=settings.attempt_check_s,
        project_s=settings.project_check_s,
    )
    reconciler = Reconciler(store, BusExecutor(bus), BusRegistry(bus), placer.policy, patience)
    return Service(
        name="scheduler",
        settings=settings,
        store=store,
        bus=bus,
        inbox=Inbox(store, "scheduler"),
        routes=routes(),
        loops=(placer.run, reconciler.run),
    )
