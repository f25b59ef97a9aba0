"""The registry, wired."""

from __future__ import annotations

from libs.common.bus import Bus
from libs.common.ids import secret_hash
from libs.common.inbox import Inbox
from libs.common.service import Service
from libs.common.store import Store
from services.registry.adapters.attempts import BusAttempts
from services.registry.adapters.filesets import BusFilesets
from services.registry.adapters.jobs import BusJobs
from services.registry.adapters.vault import FileVault
from services.registry.domain.accounts import first_token
from services.registry.handlers.accounts import bootstrap
from services.registry.handlers.models import Origins
from services.registry.handlers.secrets import Secrets
from services.registry.loops import KeyTurn, RunCheck, Upkeep
from services.registry.routes import RUNS, routes
from services.registry.settings import RegistrySettings
from services.registry.store import SKELETON, RegistryUnit
from services.registry.store.runs import SKELETON as RUNS_SKELETON
from services.registry.store.runs import RunsUnit

NAME = "registry"


def build(settings: RegistrySettings | None = None) -> Service:
    """The registry with its two databases: `registry` and, for what runs log, `registry_runs`."""
    settings = settings or RegistrySettings()
    bus = Bus(NAME, settings.nats_url, settings.nats_seed(NAME))
    jobs = BusJobs(bus)
    vault = FileVault(settings.secret_keys)
    store = Store(settings.database_for(NAME), RegistryUnit, SKELETON, NAME)
    runs = Store(settings.database_for(f"{NAME}_{RUNS}"), RunsUnit, RUNS_SKELETON, NAME)

    async def make_first_account() -> None:
        """Also renews the first token, so it is called again with each start."""
        if settings.bootstrap_token_file:
            token = first_token(settings.bootstrap_token_file.read_text())
            await bootstrap(store, secret_hash(token))

    return Service(
        name=NAME,
        settings=settings,
        store=store,
        bus=bus,
        inbox=Inbox(store, NAME),
        routes=routes(Origins(BusFilesets(bus), jobs), Secrets(vault, BusAttempts(bus), jobs)),
        loops=(
            Upkeep(store, runs, settings).run,
            RunCheck(runs, jobs, settings.reconcile_s).run,
            KeyTurn(store, vault, settings.key_turn_s).run,
        ),
        further={RUNS: Inbox(runs, NAME)},
        before_start=make_first_account,
    )
