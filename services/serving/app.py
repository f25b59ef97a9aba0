"""Composition of the serving service."""

from __future__ import annotations

import random

from libs.common.bus import Bus
from libs.common.inbox import Inbox
from libs.common.keyfiles import key_from
from libs.common.service import Service
from libs.common.store import Store
from services.serving.adapters.health import HttpHealth
from services.serving.adapters.peers import BusPasses, BusPeers
from services.serving.adapters.programs import programs
from services.serving.adapters.traefik import TraefikFiles
from services.serving.adapters.vault import FileKeyVault
from services.serving.domain.templates import FIRST_PORT, LAST_PORT
from services.serving.handlers import Handlers
from services.serving.loops import Front, Reconciler
from services.serving.routes import routes
from services.serving.settings import ServingSettings
from services.serving.steps import Steps
from services.serving.store import SKELETON, ServingUnit

NAME = "serving"
# How often the proxy's file is compared with what it ought to be, when nothing has changed.
COMPARE_EVERY = 6


def build(settings: ServingSettings | None = None) -> Service:
    settings = settings or ServingSettings()
    store = Store(settings.database_for(NAME), ServingUnit, SKELETON, NAME)
    bus = Bus(NAME, settings.nats_url, settings.nats_seed(NAME))
    inbox: Inbox[ServingUnit] = Inbox(store, NAME)
    texts = programs()
    peers = BusPeers(bus)
    passes = BusPasses(bus, key_from(settings.front_key_file))
    front = Front(store, TraefikFiles(settings.dynamic_folder, settings.traefik_api), settings.base, passes)
    steps = Steps(store, texts, lambda: random.randint(FIRST_PORT, LAST_PORT))
    reconciler = Reconciler(store, steps, front, peers, HttpHealth(), ask_every_s=settings.reconcile_s)
    inbox.after_commit(reconciler.wake.set)
    inbox.after_commit(front.note_change)
    handlers = Handlers(FileKeyVault(settings.key_file), texts, settings.apps_domain)
    return Service(
        NAME,
        settings,
        store,
        bus,
        inbox,
        routes(handlers),
        loops=(reconciler.run, lambda: front.run(COMPARE_EVERY * settings.reconcile_s)),
        describe=lambda: (not front.problem, front.problem),
    )
