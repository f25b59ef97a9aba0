"""The heavy half of the supervisor: bus and services, with everything they import."""

from __future__ import annotations

import asyncio
import importlib
import json
import time

import nats
import nats.errors

from infra.local import databases, servers
from infra.local import nats as local_nats
from infra.local.credentials import nats_public_key
from infra.local.installation import Installation, InstallationError
from infra.local.supervisor import Supervisor, share_memory
from libs.common.provision import provision_streams
from libs.common.runner import run
from services import SERVICES

PROVISION_S = 20.0


def start_bus(supervisor: Supervisor, installation: Installation) -> None:
    """Starts NATS, unless the settings name one, and creates the streams.

    Raises:
        InstallationError: it does not come up, or the one in the settings does not know our users.
    """
    config = nats_config(installation)
    if installation.settings.nats_url:
        provision_theirs(installation, config)
        return
    server = servers.nats_server(installation, config)
    supervisor.add_server(server)
    _wait_for(server)
    asyncio.run(provision(installation))


def provision_theirs(installation: Installation, config: str) -> None:
    """Creates the streams on a server that others run, whose configuration must have our users."""
    users = installation.run / "nats-users.json"
    users.write_text(json.dumps({"authorization": json.loads(config)["authorization"]}, indent=2))
    try:
        asyncio.run(_provision_in_time(installation))
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise InstallationError(
            f"{installation.nats_url} does not let us in: {str(error) or type(error).__name__}. "
            f"Its configuration needs the users in {users} (public keys and subjects, no secrets), and JetStream."
        ) from None


async def _provision_in_time(installation: Installation) -> None:
    async with asyncio.timeout(PROVISION_S):
        await provision(installation)


def start_services(supervisor: Supervisor, installation: Installation) -> None:
    """Forks the services, once all that they share has been imported.

    Raises:
        InstallationError: a database that others run cannot be used.
    """
    if installation.settings.database_url:
        asyncio.run(databases.meet_all(installation.settings.database_url))
    for name in SERVICES:
        importlib.import_module(f"services.{name}.app")
    share_memory()
    for name in SERVICES:
        supervisor.add_service(name, run, {})


def nats_config(installation: Installation) -> str:
    grants = local_nats.all_grants()
    folder = installation.keys / "nats"
    return local_nats.config_text(
        host=installation.inner_host,
        port=installation.ports["nats"],
        store=installation.home / "data" / "nats",
        public_keys={grant.user: nats_public_key(folder, grant.user) for grant in grants},
        grants=grants,
        sync=installation.settings.nats_sync,
    )


async def provision(installation: Installation) -> None:
    """Creates the streams, as the only user who may.

    Raises:
        InstallationError: the server takes smaller messages than we send.
    """
    seed = (installation.keys / "nats" / f"{local_nats.PROVISIONER}.nk").read_text().strip()
    connection = await nats.connect(installation.nats_url, nkeys_seed_str=seed, allow_reconnect=False)
    try:
        if connection.max_payload < local_nats.MAX_PAYLOAD_BYTES:
            raise InstallationError(
                f"{installation.nats_url} takes messages of up to {connection.max_payload} bytes, and the list of "
                f"files of a large folder is longer. It needs max_payload: {local_nats.MAX_PAYLOAD_BYTES} in its "
                "configuration."
            )
        await provision_streams(connection.jetstream())
    finally:
        await connection.close()


def _wait_for(server: servers.Server, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not server.ready():
        if time.monotonic() > deadline:
            raise InstallationError(f"{server.name} did not come up in {timeout_s:.0f} s. See its log.")
        time.sleep(0.01)
