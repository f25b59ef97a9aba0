"""A real NATS server for tests, with the platform's own users, permissions, streams and consumers."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nats

from infra.local import nats as local_nats
from infra.local.credentials import nats_public_key
from libs.common.bus import Bus
from libs.common.provision import provision_consumers, provision_streams
from libs.common.routing import Routes
from tests.support.ports import free_port, wait_for_port

BINARY = Path(sys.executable).parent / "nats-server"


@dataclass
class NatsServer:
    """A running server; `kill` and `start` stand for an unclean stop and a restart with the same store."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def seed(self, user: str) -> str:
        return (self.folder / "keys" / f"{user}.nk").read_text().strip()

    def start(self) -> None:
        log = (self.folder / "nats.log").open("ab")
        config = str(self.folder / "nats.conf")
        self.process = subprocess.Popen([str(BINARY), "-c", config], stdout=log, stderr=log)
        wait_for_port(self.port)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        if self.process:
            self.process.send_signal(signal_number)
            self.process.wait(20)
            self.process = None

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def bus(self, service: str) -> Bus:
        """An unstarted bus, signed in as this service."""
        return Bus(service, self.url, self.seed(service))

    async def provision(self, *routes: Routes) -> None:
        """The installation's step: streams, and the consumers of these services."""
        connection = await nats.connect(self.url, nkeys_seed_str=self.seed(local_nats.PROVISIONER))
        try:
            await provision_streams(connection.jetstream())
            for each in routes:
                await provision_consumers(connection.jetstream(), each)
        finally:
            await connection.close()


@contextmanager
def running_nats(folder: Path, grants: Sequence[local_nats.Grant], host: str = "127.0.0.1") -> Iterator[NatsServer]:
    """A server that knows these users besides the provisioner, stopped at the end whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    everyone = local_nats.merged([*grants, local_nats.provisioner_grant()])
    keys = {grant.user: nats_public_key(folder / "keys", grant.user) for grant in everyone}
    server = NatsServer(folder, free_port())
    text = local_nats.config_text(
        host=host, port=server.port, store=folder / "store", public_keys=keys, grants=everyone
    )
    (folder / "nats.conf").write_text(text)
    try:
        server.start()
        yield server
    finally:
        server.stop(signal.SIGKILL)
