"""Wiring: the gateway from its parts, and how it starts and stops."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libs.common.bus import Bus
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import ServiceStatus
from libs.common.inbox import Inbox
from libs.common.probes import Probes, write_whole
from libs.common.routing import Routes
from libs.common.service import with_status
from libs.common.version import VERSION
from libs.common.waiting import end
from libs.common.watchdog import Watchdog
from services.gateway.adapters.events import NatsEventLog
from services.gateway.adapters.hints import NatsHints
from services.gateway.adapters.owners import BusOwners
from services.gateway.adapters.secrets import SecretMaker, load_key
from services.gateway.authentication import Authenticator
from services.gateway.domain.tokens import Limits, TokenCache
from services.gateway.following import JobFollower
from services.gateway.http.application import application
from services.gateway.http.parts import Parts
from services.gateway.routes import routes
from services.gateway.server import WebServer
from services.gateway.settings import GatewaySettings

NAME = "gateway"

log = logging.getLogger(__name__)


class Stateless:
    """Stands where the other services have their store: there is nothing to read and nothing to write."""

    @asynccontextmanager
    async def view(self) -> AsyncIterator[None]:
        yield None


@dataclass
class Gateway:
    """The running gateway; like the other services, but without a store."""

    settings: GatewaySettings
    bus: Bus
    hints: NatsHints
    parts: Parts
    routes: Routes
    name: str = NAME
    store: None = None
    _started: float = field(default_factory=time.monotonic)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """HTTP first, so that it answers at once; what needs the bus says 503 until it is there."""
        nothing: Any = Stateless()
        self.bus.serve(with_status(self.routes, self._status), Inbox(nothing, NAME))
        web = WebServer(application(self.parts), self.settings)
        probes = Probes(NAME, self.settings, lambda: self.bus.connected)
        tasks: list[asyncio.Task[None]] = []
        try:
            await web.start()
            await probes.start()
            probes.tell_address()
            publish_address(self.settings.home / "run" / f"{NAME}.json", web.address)
            await self.bus.start()
            loops = (
                self.parts.authenticator.watch_revocations(self.hints),
                Watchdog(lambda: self.bus.connected).run(),
            )
            tasks = [asyncio.create_task(loop) for loop in loops]
            log.info("started", extra={"version": VERSION, "http": web.address})
            yield
        finally:
            self.hints.close()
            await web.stop()
            await end(tasks)
            await self.bus.stop()
            await probes.stop()

    async def _status(self, _message: Message, _view: None, _call: Envelope) -> ServiceStatus:
        uptime_s = round(time.monotonic() - self._started, 1)
        return ServiceStatus(name=NAME, version=VERSION, ready=True, uptime_s=uptime_s)


def build(settings: GatewaySettings | None = None) -> Gateway:
    """The gateway of these settings; it reads its key (or makes it) and listens to nothing before `running`."""
    chosen = settings or GatewaySettings()
    bus = Bus(NAME, chosen.nats_url, _seed(chosen))
    owners, hints = BusOwners(bus), NatsHints(bus)
    parts = Parts(
        settings=chosen,
        owners=owners,
        authenticator=Authenticator(owners, TokenCache(Limits()), time.monotonic),
        follower=JobFollower(owners, hints, chosen.follow_poll_s),
        event_log=NatsEventLog(bus),
        secrets=SecretMaker(load_key(chosen.home / "keys" / "gateway.key")),
    )
    return Gateway(chosen, bus, hints, parts, routes())


def publish_address(path: Path, address: str) -> None:
    """Adds where HTTP listens to what the probes have written, in one step for whoever reads it."""
    known = json.loads(path.read_text()) if path.exists() else {}
    write_whole(path, json.dumps(known | {"http": address}))


def _seed(settings: GatewaySettings) -> str:
    """A bus that asks for no credentials, as in tests, has no seed file."""
    try:
        return settings.nats_seed(NAME)
    except FileNotFoundError:
        return ""
