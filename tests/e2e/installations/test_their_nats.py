"""An existing NATS server instead of our own: what `up` says when it does not know us, and that it works otherwise."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from infra.local import nats as local_nats
from infra.local.installation import InstallationError, open_installation
from infra.local.settings import LocalSettings
from infra.local.stack import nats_config, provision_theirs
from tests.support.nats import running_nats

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


def test_a_server_with_our_users_gets_our_streams(tmp_path: Path) -> None:
    async def stream_names(url: str, seed: str) -> set[str]:
        import nats

        connection = await nats.connect(url, nkeys_seed_str=seed)
        try:
            return {info.config.name or "" for info in await connection.jetstream().streams_info()}
        finally:
            await connection.close()

    with running_nats(tmp_path / "theirs", []) as theirs:
        keys = tmp_path / "home" / "keys" / "nats"
        keys.mkdir(parents=True)
        (keys / "provisioner.nk").write_text(theirs.seed("provisioner"))
        installation = open_installation(LocalSettings(home=tmp_path / "home", nats_url=theirs.url))
        provision_theirs(installation, nats_config(installation))
        assert asyncio.run(stream_names(theirs.url, theirs.seed("provisioner"))) >= {"EVT", "CMD", "LOG", "DEADLETTER"}
