"""Wires the storage service together."""

from __future__ import annotations

from libs.common.bus import Bus
from libs.common.inbox import Inbox
from libs.common.service import Service
from libs.common.store import Store
from services.storage.adapters.frames import BusFrames
from services.storage.adapters.jobs import BusJobs
from services.storage.adapters.s3 import S3
from services.storage.adapters.tail import Tail
from services.storage.handlers import FilesetHandlers
from services.storage.log_handlers import LogHandlers
from services.storage.loops.filesets import BucketKeeper, Sweeper
from services.storage.loops.logs import LogCheck, LogKeeper, LogScrub
from services.storage.routes import routes
from services.storage.settings import StorageSettings
from services.storage.store import SKELETON, StorageUnit

NAME = "storage"


def build(settings: StorageSettings | None = None) -> Service:
    settings = settings or StorageSettings()
    store = Store(settings.database_for(NAME), StorageUnit, SKELETON, NAME)
    bus = Bus(NAME, settings.nats_url, settings.nats_seed(NAME))
    inbox = Inbox(store, NAME)
    s3 = S3(settings)
    tail = Tail(bus.hint)
    filesets = FilesetHandlers(store, s3, s3)
    logs = LogHandlers(store, s3, tail, settings)
    keeper = LogKeeper(store, inbox, logs, s3, BusFrames(bus), settings=settings)
    inbox.after_commit(tail.committed)
    inbox.after_commit(keeper.committed)
    bucket = BucketKeeper(s3, settings, keeper.wake)
    scrub = LogScrub(store, s3, s3, settings)
    check = LogCheck(store, inbox, logs, BusJobs(bus), settings)
    sweeper = Sweeper(store, s3, settings)
    return Service(
        name=NAME,
        settings=settings,
        store=store,
        bus=bus,
        inbox=inbox,
        routes=routes(filesets, logs),
        loops=(bucket.run, keeper.run, scrub.run, tail.run, check.run, sweeper.run),
        describe=lambda: _described(s3),
    )


def _described(s3: S3) -> tuple[bool, str]:
    if s3.problem:
        return False, f"{s3.problem} Uploads and downloads wait; logs are kept in the database meanwhile."
    return True, ""
