"""`up`, `down` and `supervise`: one installation on this machine, started in the background and stopped whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TextIO

from infra.local import leftovers, servers
from infra.local.credentials import api_token, s3_keys, write_private
from infra.local.installation import Installation, InstallationError, claim_ports, open_installation, seaweed_sockets
from infra.local.settings import CHECKOUT, LocalSettings
from infra.local.supervisor import Supervisor
from services.executor.adapters.networks import network_host
from services.executor.adapters.runtimes import isolation
from services.executor.domain.isolation import is_loopback, refusal
from services.executor.domain.network import installation_tag

UP_TIMEOUT_S = 120.0
DOWN_TIMEOUT_S = 60.0
DEPARTURE_S = 40.0
# Children of a killed supervisor were told to end by the kernel; services close their databases in this time.
LEFTOVER_PATIENCE_S = 3.0
# How a supervisor's last words to people begin, in its log.
SAID = "nabla: "
# Linux's struct flock: type, whence, start, length, pid.
FLOCK = "hhqqi4x"

log = logging.getLogger("nabla.supervisor")


def up(settings: LocalSettings, say: Callable[[str], None]) -> Installation:
    """Starts the installation unless it runs, and returns when its front door answers.

    Ray may still be coming up then; jobs submitted meanwhile wait and say so.

    Raises:
        InstallationError: it did not come up in time, or its supervisor ended.
    """
    with _turn(open_installation(settings), say):
        # A first `up` may have claimed the ports meanwhile, and its processes are no leftovers.
        installation = open_installation(settings)
        if supervisor_pid(installation):
            say(f"Nabla is already running at {installation.ui}")
            return installation
        _refuse_open_doors(settings)
        # What a killed supervisor left would hold our ports.
        leftovers.end_processes(installation.home, LEFTOVER_PATIENCE_S)
        installation, moved = claim_ports(installation)
        for line in moved:
            say(line)
        _wait_for_front_door(installation, _start_in_background(installation))
        return installation


@contextlib.contextmanager
def _turn(installation: Installation, say: Callable[[str], None]) -> Iterator[None]:
    """One `up` after the other."""
    with (installation.run / "up.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another `up` is starting Nabla here: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _refuse_open_doors(settings: LocalSettings) -> None:
    """Jobs without walls and a door for everybody: not even started."""
    if is_loopback(settings.host):
        return
    found = isolation.probe(settings.isolation)
    if forbidden := refusal(found.isolation, settings.host, team_number=1):
        raise InstallationError(f"{forbidden}: {isolation.in_words(found)}")


def _start_in_background(installation: Installation) -> subprocess.Popen[bytes]:
    with (installation.logs / "supervisor.log").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "services", "supervise"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=CHECKOUT,
            env=os.environ | {"NABLA_HOME": str(installation.home)} | leftovers.marked(installation.home),
            start_new_session=True,
        )


def _wait_for_front_door(installation: Installation, supervisor: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + UP_TIMEOUT_S
    while time.monotonic() < deadline and supervisor.poll() is None:
        if front_door_answers(installation):
            return
        time.sleep(0.05)
    tail = (installation.logs / "supervisor.log").read_text(errors="replace").splitlines()[-8:]
    if tail and tail[-1].startswith(SAID):
        raise InstallationError(tail[-1].removeprefix(SAID))
    raise InstallationError(
        "Nabla did not come up. The end of its log:\n  " + "\n  ".join(tail) + f"\nAll logs are in {installation.logs}"
    )


def front_door_answers(installation: Installation) -> bool:
    url = f"{installation.front_door}/api/v1/health"
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def down(settings: LocalSettings, say: Callable[[str], None]) -> None:
    """Stops everything, running jobs included, and keeps all data.

    Raises:
        InstallationError: something is still running after a minute.
    """
    installation = open_installation(settings)
    pid = supervisor_pid(installation)
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + DOWN_TIMEOUT_S
        while supervisor_pid(installation):
            if time.monotonic() > deadline:
                raise InstallationError(f"The supervisor (process {pid}) does not end. Look at {installation.logs}.")
            time.sleep(0.1)
    if settings.ray_address:
        _leave_their_ray(installation, say)
    leftovers.end_processes(installation.home, LEFTOVER_PATIENCE_S)
    leftovers.end_attempts(installation.home / "node" / "attempts")
    # Its agent was killed with Ray, and could not.
    network_host.take_wall_down(installation_tag(str(installation.home / "node")))
    shutil.rmtree(installation.ray_folder, ignore_errors=True)
    for port in installation.ports.values():
        for socket_file in seaweed_sockets(port):
            with contextlib.suppress(OSError):
                socket_file.unlink()
    say("Nabla is stopped; all data are kept" if pid else "Nabla was not running")


def _leave_their_ray(installation: Installation, say: Callable[[str], None]) -> None:
    """Ends our agents on a cluster that goes on without us."""
    address, namespace = installation.settings.ray_address, installation.settings.ray_namespace
    command = [sys.executable, "-m", "services.executor.adapters.cluster.ray_departure", address, namespace]
    env = os.environ | servers.ray_environment(installation)
    try:
        subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=DEPARTURE_S, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        say(f"Our agents may be left on the Ray cluster at {address}, as it does not answer: call `nabla down` again.")


def supervisor_pid(installation: Installation) -> int:
    """The running supervisor's pid, or 0.

    The kernel tells who holds the lock, not the file: a pid in a file may be somebody else's by now.
    """
    try:
        with (installation.run / "supervisor.lock").open("r+") as file:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_, pid = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except FileNotFoundError:
        return 0
    return 0 if kind == fcntl.F_UNLCK else int(pid)


def supervise(settings: LocalSettings) -> None:
    """Runs the installation in this process until SIGTERM."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel("WARNING")
    installation = open_installation(settings)
    with _lock(installation):
        supervisor = Supervisor(installation.run, installation.logs)
        os.environ.update(service_environment(installation) | leftovers.marked(installation.home))
        _start_servers(supervisor, installation)
        # Imported only now: Ray, which takes longest, is already on its way meanwhile.
        from infra.local import stack

        stack.start_bus(supervisor, installation)
        stack.start_services(supervisor, installation)
        supervisor.watch()


@contextlib.contextmanager
def _lock(installation: Installation) -> Iterator[TextIO]:
    """Held by this process alone. One of `flock` would also be held by every forked service, after our own end."""
    with (installation.run / "supervisor.lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InstallationError("Nabla is already running here.") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file


def _start_servers(supervisor: Supervisor, installation: Installation) -> None:
    settings = installation.settings
    if not settings.ray_address:
        address = f"{installation.inner_host}:{installation.ports['ray']}"
        write_private(installation.run / "ray.json", json.dumps({"address": address}))
        supervisor.add_server(servers.ray_head(installation))
    if not settings.s3_endpoint:
        supervisor.add_server(servers.seaweed(installation))
    supervisor.add_server(servers.traefik(installation))


def service_environment(installation: Installation) -> dict[str, str]:
    """What every service is told; also written to a file, so that one can be started alone by hand."""
    settings = installation.settings
    token_file = installation.keys / "api-token"
    token = api_token(installation.keys)
    if settings.s3_access_key:
        keys = {"access_key": settings.s3_access_key, "secret_key": settings.s3_secret_key}
        write_private(installation.keys / "s3.json", json.dumps(keys))
    s3_keys(installation.keys)
    env = (
        _given()
        | servers.ray_environment(installation)
        | {
            "NABLA_HOME": str(installation.home),
            "NABLA_INSTALLATION_ID": installation.id,
            "NABLA_NATS_URL": installation.nats_url,
            "NABLA_FRONT_DOOR": installation.front_door,
            "NABLA_S3_ADDRESS": installation.s3_endpoint,
            "NABLA_S3_ENDPOINT": installation.s3_endpoint,
            "NABLA_TRAEFIK_DYNAMIC": str(installation.traefik_dynamic),
            "NABLA_TRAEFIK_API": installation.traefik_api,
            "NABLA_BOOTSTRAP_TOKEN_FILE": str(token_file),
            "NABLA_LOG_LEVEL": settings.log_level,
            "NABLA_HOST": settings.host,
            "NABLA_ISOLATION": settings.isolation,
        }
    )
    if settings.database_url:
        env["NABLA_DATABASE_URL"] = settings.database_url
    if settings.node_address:
        door = f"http://{settings.node_address}:{installation.ports['front_door']}"
        env |= {"NABLA_NODE_ADDRESS": settings.node_address, "NABLA_NODE_FRONT_DOOR": door}
    if settings.ray_address:
        env["NABLA_RAY_ADDRESS"] = settings.ray_address
        env["NABLA_RAY_NAMESPACE"] = settings.ray_namespace
    if (installation.home / "nabla.toml").exists():
        env["NABLA_SETTINGS"] = str(installation.home / "nabla.toml")
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(env.items())]
    write_private(installation.run / "environment", "\n".join(lines) + "\n")
    context = {
        "url": installation.front_door,
        "token": token,
        "ui": installation.ui,
        "installation_id": installation.id,
    }
    write_private(installation.home / "context.json", json.dumps(context, indent=2))
    return env


def _given() -> dict[str, str]:
    """Settings of services that came by the environment of `up`; not what belongs to the client."""
    own = {name: value for name, value in os.environ.items() if name.startswith("NABLA_")}
    return {name: value for name, value in own.items() if name not in {leftovers.MARK, "NABLA_TOKEN", "NABLA_URL"}}
