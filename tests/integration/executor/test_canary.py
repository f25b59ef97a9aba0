"""A secret's whole way, through five services, a bus, an object store and a job; then it is looked for everywhere.

All of Nabla but Ray and the front door: the command line sets a secret and submits a job that prints it in all forms.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from infra.local.credentials import api_token
from infra.local.nats import all_grants
from nabla import Client
from nabla.errors import NablaError, NotFound
from nabla.objects import Container, Job, JobTemplate
from services.executor.app import agent_config, build
from services.executor.settings import ExecutorSettings
from tests.integration.executor.one_node import OneNode
from tests.support.nats import NatsServer, running_nats
from tests.support.ports import free_port
from tests.support.seaweed import Seaweed, running_seaweed

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
ROOT = Path(__file__).resolve().parents[3]
OTHERS = ("registry", "scheduler", "storage", "gateway")
PATIENCE_S = 60.0

JOB = """
import base64, hashlib, json, os, sys, urllib.parse
value = os.environ["CANARY"]
print(value)
print(json.dumps({"value": value}))
print(base64.b64encode(value.encode()).decode())
print(base64.b64encode(b"user:" + value.encode()).decode())
print("https://user:" + urllib.parse.quote(value, safe="") + "@host/?q=" + urllib.parse.quote_plus(value))
sys.stdout.write(value[:9]); sys.stdout.flush(); sys.stdout.write(value[9:] + "\\n")
print(hashlib.sha256(value.encode()).hexdigest())
open(os.environ["NABLA_ARTIFACTS"] + "/digest", "w").write(hashlib.sha256(value.encode()).hexdigest())
raise SystemExit("failed with " + value)
"""


def forms(value: str) -> list[bytes]:
    """In which it could lie somewhere; of base64 what does not depend on its surroundings."""
    found = {value, quote(value, safe=""), quote(value), quote_plus(value)}
    found.add(value.encode().hex())
    for only_ascii in (True, False):
        once = json.dumps(value, ensure_ascii=only_ascii)[1:-1]
        found |= {once, *(json.dumps(once, ensure_ascii=again)[1:-1] for again in (True, False))}  # and JSON in JSON
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + value.encode()).decode().rstrip("=")
        found |= {encoded[4:-4], encoded[4:-4].replace("+", "-").replace("/", "_")}
    return [form.encode() for form in found]


def places_with(value: str, *folders: Path) -> list[str]:
    """Files and processes in which a form of the value is."""
    looked_for, found = forms(value), []
    for folder in folders:
        files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        found += [str(path) for path in files if holds(path, looked_for)]
    for name in filter(str.isdigit, os.listdir("/proc")):
        if int(name) != os.getpid():
            found += [
                f"/proc/{name}/{what}"
                for what in ("cmdline", "environ")
                if holds(Path("/proc", name, what), looked_for)
            ]
    return found


def holds(path: Path, looked_for: list[bytes]) -> bool:
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        return any(form in content for form in looked_for)
    return False


class World:
    """A home, its servers, and how services are told of them."""

    def __init__(self, home: Path, nats: NatsServer, seaweed: Seaweed) -> None:
        self.home = home
        self.nats = nats
        self.seaweed = seaweed
        self.url = f"http://127.0.0.1:{free_port()}"
        self.token = api_token(home / "keys")
        self.settings = {
            "NABLA_HOME": str(home),
            "NABLA_NATS_URL": nats.url,
            "NABLA_NATS_KEYS": str(nats.folder / "keys"),
            "NABLA_S3_ADDRESS": seaweed.address,
            "NABLA_S3_KEYS": str(seaweed.keys_file),
            # What the object store's links are for; the gateway has an address of its own here.
            "NABLA_FRONT_DOOR": f"http://{seaweed.address}",
            "NABLA_HTTP_PORT": self.url.rsplit(":", 1)[1],
            "NABLA_BOOTSTRAP_TOKEN_FILE": str(home / "keys" / "api-token"),
            "NABLA_LOG_LEVEL": "DEBUG",
        }

    def client(self) -> Client:
        return Client(self.url, self.token, patience_s=PATIENCE_S)

    def nabla(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        own = {"NABLA_URL": self.url, "NABLA_TOKEN": self.token, "NABLA_CONFIG": str(self.home / "config.json")}
        nabla = str(Path(sys.executable).parent / "nabla")
        return subprocess.run(
            [nabla, *arguments],
            env=clean() | own,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=self.home,
        )

    @contextmanager
    def services(self) -> Iterator[None]:
        """Each in a process of its own, with its log in a file."""
        (self.home / "logs").mkdir(exist_ok=True)
        processes = []
        try:
            for name in OTHERS:
                log = (self.home / "logs" / f"{name}.log").open("ab")
                command = [sys.executable, "-m", "services", name]
                environment = clean() | self.settings
                processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
            yield
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    @asynccontextmanager
    async def executor(self) -> AsyncIterator[None]:
        settings = ExecutorSettings(
            home=self.home,
            nats_url=self.nats.url,
            nats_keys=self.nats.folder / "keys",
            front_door=f"http://{self.seaweed.address}",
            reconcile_s=0.5,
            look_s=0.5,
            keep_folder_s=600.0,
        )
        cluster = OneNode(agent_config(settings))
        await cluster.open()
        service = build(settings, cluster)
        async with service.running():
            yield


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("NABLA_")}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    home = tmp_path / "home"
    with (
        running_nats(home / "nats", all_grants()) as nats,
        running_seaweed(home / "objects") as seaweed,
    ):
        asyncio.run(nats.provision())
        yield World(home, nats, seaweed)


def ended(client: Client, job_id: str) -> tuple[Job, list[str]]:
    lines, job = [], Job()
    # A thread that waits for ever would hold up the whole suite, also when the test has been given up.
    deadline = time.monotonic() + 90.0
    for event in client.jobs.watch(job_id):
        assert time.monotonic() < deadline, (job.state, lines)
        if isinstance(event, Job):
            job = event
        else:
            lines.append(event.text)
    return job, lines


async def test_a_secret_is_nowhere_but_in_its_job(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    # With what JSON, URLs and shells each write in another way.
    value, ordinary = (f'canary "{secrets.token_urlsafe(12)}" é/+&?' for _ in range(2))
    with world.services():
        async with world.executor():
            await asyncio.to_thread(walk, world, value, ordinary)
        in_use = places_with(value, world.home)
    at_rest = places_with(value, world.home)
    assert (in_use, at_rest) == ([], [])
    found = " ".join(places_with(ordinary, world.home))
    for place in ("data/scheduler.db", "data/executor.db", "nats/store", "spec.json", "order.json"):
        assert place in found, "the search finds what is no secret"
    assert not any(form in caplog.text.encode() for form in forms(value))


def walk(world: World, value: str, ordinary: str) -> None:
    """What people do with a secret, over the command line and the API."""
    with world.client() as client:
        client.projects.create("digits")
    missing = world.nabla("run", "--project", "digits", "--no-workspace", "--env", "A=secret:CANARY", "--", "true")
    assert missing.returncode != 0
    assert "nabla secrets set CANARY" in missing.stderr
    done = world.nabla("secrets", "set", "CANARY", "--project", "digits", stdin=value + "\n")
    assert done.returncode == 0, done.stderr
    assert "CANARY" in world.nabla("secrets", "list", "--project", "digits").stdout
    refused = world.nabla("secrets", "set", "bad name", stdin=value)
    assert refused.returncode != 0
    assert "canary" not in refused.stdout + refused.stderr
    with world.client() as client:
        env = {"CANARY": "secret:CANARY", "ORDINARY": ordinary}
        template = JobTemplate(name="canary", command=("python3", "-c", JOB), env=env)
        job, lines = ended(client, client.jobs.submit("digits", template).id)
        assert job.exit_code == 1, lines
        text = "\n".join(lines)
        assert text.count("***") >= 7
        assert not any(form in text.encode() for form in forms(value))
        assert digest(value) in lines, "the job had the very value"
        _race(world, client, template)
        plain = JobTemplate(command=("true",), container=Container(image="i", registry_password=value))
        with pytest.raises(NablaError, match="plain text"):
            client.jobs.submit("digits", plain)


def _race(world: World, client: Client, template: JobTemplate) -> None:
    """A secret that is deleted between submit and start: the job ends with the reason."""
    held = [client.jobs.submit("digits", JobTemplate(command=("sleep 60",))) for _ in range(4)]
    late = client.jobs.submit("digits", template)
    done = world.nabla("secrets", "delete", "CANARY", "--project", "digits")
    assert late.id in done.stderr, done.stderr
    with pytest.raises(NotFound, match="no secret CANARY"):
        client.jobs.submit("digits", template)
    for job in held:
        client.jobs.stop(job.id)
    job, lines = ended(client, late.id)
    assert job.state == "failed"
    assert "There is no secret CANARY in this project or team." in job.detail
    assert any("nabla secrets set CANARY" in line for line in lines)


def digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()
