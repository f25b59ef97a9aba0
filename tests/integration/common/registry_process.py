"""The real registry as a process of its own, with its real NATS, to be killed, filled and started again."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.nats import Grant, events_of, grant_for
from libs.common.bus import Bus
from libs.common.clock import utc_now
from libs.common.contracts import messages as m
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.subjects import EVENTS, filter_for, subject_for
from libs.common.errors import Unavailable
from libs.common.ids import new_secret, secret_hash
from libs.common.routing import Routes, routes_of
from tests.support.nats import NatsServer

ROOT = Path(__file__).resolve().parents[3]
ROUTES = routes_of("registry")
GATEWAY = m.Principal(kind="service", id="gateway")
ASKER = Routes("gateway", (), sends=tuple(route.message for route in ROUTES.routes if route.message.ROUTE.reply))
# The gateway's user speaks for the scheduler, too, and may look at the streams.
GRANTS = (
    grant_for(ROUTES),
    grant_for(ASKER),
    Grant("gateway", publish=tuple(filter_for(event) for event in events_of("scheduler"))),
    Grant("gateway", publish=("$JS.API.STREAM.INFO.>", "$JS.API.CONSUMER.INFO.>", "$JS.API.STREAM.MSG.GET.>")),
    Grant("gateway", publish=("$JS.API.DIRECT.GET.>",)),
)


@dataclass
class RegistryProcess:
    """Starts and restarts `python -m services registry` in one home.

    Args:
        settings: further variables of its environment.
    """

    server: NatsServer
    home: Path
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def token_file(self) -> Path:
        return self.home.parent / "first-token"

    def start(self, fault: str = "") -> subprocess.Popen[bytes]:
        if not self.token_file.exists():
            self.token_file.write_text(new_secret("nbl"))
        environment = {
            **os.environ,
            "NABLA_HOME": str(self.home),
            "NABLA_NATS_URL": self.server.url,
            "NABLA_NATS_KEYS": str(self.server.folder / "keys"),
            "NABLA_BOOTSTRAP_TOKEN_FILE": str(self.token_file),
            "NABLA_FAULT": fault,
            "NABLA_TRACES": "false",
            **self.settings,
        }
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "services", "registry"]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        return self.process

    @property
    def log(self) -> Path:
        return self.server.folder / f"registry-{self.home.name}.log"

    @property
    def said(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait(20)

    async def signed_in(self, asker: Bus) -> m.Principal:
        """The owner of the installation, as soon as the registry answers."""
        asked = m.AuthenticateToken(token_hash=secret_hash(self.token_file.read_text().strip()))
        found: list[m.Principal] = []

        async def answers() -> bool:
            assert self.process
            if self.process.poll() is None:
                try:
                    found.append(await asker.ask(asked, m.Principal, GATEWAY, timeout_s=2))
                except Unavailable:
                    return False
            return True

        await until(answers)
        return found[0]


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.03)


async def tell(bus: Bus, event: Message, event_id: str) -> None:
    """Publishes an event as the scheduler's relay would."""
    envelope = Envelope(id=event_id, type=event.ROUTE.type, source="scheduler", time=utc_now())
    await bus.publish_stored(EVENTS, subject_for(type(event), team="t1"), envelope.headers(), event.to_wire())
