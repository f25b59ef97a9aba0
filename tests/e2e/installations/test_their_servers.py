"""Servers that others run instead of our own: NATS, PostgreSQL, S3 and Ray, each named in the settings."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.local import demo
from infra.local.databases import DATABASES
from infra.local.installation import open_installation
from infra.local.settings import LocalSettings
from infra.local.stack import nats_config
from nabla.objects import LogLine
from services import SERVICES
from tests.support.databases import postgres_binaries
from tests.support.nats import NatsServer
from tests.support.platform import running_platform
from tests.support.ports import free_port
from tests.support.ray import running_ray
from tests.support.seaweed import ACCESS_KEY, SECRET_KEY, running_seaweed

pytestmark = [pytest.mark.e2e, pytest.mark.postgres, pytest.mark.full]


@pytest.fixture
def postgres(postgres_url: str) -> str:
    """A server with the six databases that the README names, all of one installation."""
    binaries = postgres_binaries()
    assert binaries
    port = postgres_url.rsplit(":", 1)[1]
    for name in DATABASES:
        subprocess.run(
            [str(binaries / "createdb"), "-h", "127.0.0.1", "-p", port, "-U", "nabla", f"theirs_{name}"],
            check=True,
            timeout=60,
        )
    return postgres_url + "/theirs_{service}"


@contextmanager
def their_nats(home: Path, folder: Path) -> Iterator[NatsServer]:
    """A server that was given the users which `up` writes down for it."""
    folder.mkdir()
    server = NatsServer(folder, free_port())
    config = json.loads(nats_config(open_installation(LocalSettings(home=home))))
    config |= {"listen": f"127.0.0.1:{server.port}"}
    config["jetstream"] |= {"store_dir": str(folder / "store")}
    (folder / "nats.conf").write_text(json.dumps(config))
    try:
        server.start()
        yield server
    finally:
        server.kill()


def test_the_demo_goes_its_whole_way_on_servers_that_others_run(tmp_path: Path, postgres: str) -> None:
    home = tmp_path / "home"
    with (
        their_nats(home, tmp_path / "nats") as nats,
        running_seaweed(tmp_path / "s3") as objects,
        running_ray() as ray,
        running_platform(
            home,
            nats_url=nats.url,
            database_url=postgres,
            s3_endpoint=objects.address,
            s3_access_key=ACCESS_KEY,
            s3_secret_key=SECRET_KEY,
            ray_address=ray.address,
            ray_token=ray.environment["RAY_AUTH_TOKEN"],
        ) as platform,
        platform.client() as client,
    ):
        assert set(platform.children()) == {*SERVICES, "traefik"}, "no server of our own"
        job = demo.train(client)
        deployment = demo.deploy(client, demo.registered_model(client, job))
        assert demo.predict(client, deployment) >= demo.SHOWN - 1
        lines = [line.text for line in client.jobs.logs(job.id) if isinstance(line, LogLine)]
        assert any("accuracy" in line for line in lines)
        assert list((home / "data").glob("*.db")) == [], "nothing in SQLite"
        # What others run goes on when we stop.
        assert ray.agents()
        platform.down()
        assert ray.processes()
        assert not ray.agents(), "what is ours is gone from it"
        assert nats.process
        assert nats.process.poll() is None
        platform.up()
        with platform.client() as again:
            assert again.jobs.get(job.id).job.state == "succeeded"
