"""An existing NATS server instead of our own: what `up` says when it does not know us, and that it works otherwise."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from infra.local import nats as local_nats
from infra.local.installation import Installation, InstallationError, open_installation
from infra.local.settings import LocalSettings
from infra.local.stack import nats_config, provision_theirs
from tests.support.nats import NatsServer, running_nats

pytestmark = pytest.mark.e2e


def test_a_server_that_does_not_know_our_users_is_answered_with_what_it_needs(tmp_path: Path) -> None:
    with running_nats(tmp_path / "theirs", [local_nats.Grant("somebody")]) as theirs:
        installation = open_installation(LocalSettings(home=tmp_path / "home", nats_url=theirs.url))
        with pytest.raises(InstallationError, match=r"nats-users\.json"):
            provision_theirs(installation, nats_config(installation))
    users = json.loads((installation.run / "nats-users.json").read_text())["authorization"]["users"]
    assert {user["nkey"][0] for user in users} == {"U"}
    secrets = {file.read_text().strip() for file in (installation.keys / "nats").glob("*.nk")}
    assert secrets
    assert not any(secret in (installation.run / "nats-users.json").read_text() for secret in secrets)


def test_a_server_that_takes_only_small_messages_is_refused_with_the_setting_it_needs(tmp_path: Path) -> None:
    with running_nats(tmp_path / "theirs", []) as theirs:
        theirs.stop()
        file = theirs.folder / "nats.conf"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"max_payload": 1 << 20}))
        theirs.start()
        installation = signed_in(tmp_path / "home", theirs)
        with pytest.raises(InstallationError, match="max_payload: 8388608"):
            provision_theirs(installation, nats_config(installation))


def signed_in(home: Path, theirs: NatsServer) -> Installation:
    """An installation with the provisioner's key that this server knows."""
    keys = home / "keys" / "nats"
    keys.mkdir(parents=True)
    (keys / "provisioner.nk").write_text(theirs.seed("provisioner"))
    return open_installation(LocalSettings(home=home, nats_url=theirs.url))


def test_a_server_with_our_users_gets_our_streams(tmp_path: Path) -> None:
    async def stream_names(url: str, seed: str) -> set[str]:
        import nats

        connection = await nats.connect(url, nkeys_seed_str=seed)
        try:
            return {info.config.name or "" for info in await connection.jetstream().streams_info()}
        finally:
            await connection.close()

    with running_nats(tmp_path / "theirs", []) as theirs:
        installation = signed_in(tmp_path / "home", theirs)
        provision_theirs(installation, nats_config(installation))
        assert asyncio.run(stream_names(theirs.url, theirs.seed("provisioner"))) >= {"EVT", "CMD", "LOG", "DEADLETTER"}
