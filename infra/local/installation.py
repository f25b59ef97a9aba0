"""One installation: its folder, its ports and its addresses, remembered from start to start."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from infra.local.credentials import secret_file, write_private
from infra.local.settings import LocalSettings

# Below Ray's workers (10002-19999) and beside the usual defaults, so that strangers are rarely met.
PREFERRED_PORTS = {
    "front_door": 8080,
    "traefik_api": 23370,
    "nats": 24222,
    "s3": 23360,
    "s3_grpc": 23361,
    "filer": 23350,
    "filer_grpc": 23351,
    "volume": 23340,
    "volume_grpc": 23341,
    "master": 23333,
    "master_grpc": 23334,
    "ray": 26399,
    "ray_agent": 26400,
}

# Enough for a hundred installations of one user, each with its dozen, before anybody is turned away.
LOOK_AT = 1500


class InstallationError(Exception):
    """The installation cannot be started or stopped: what happened, why, and what to do."""


@dataclass(frozen=True)
class Installation:
    """Where everything of one installation lives. Nothing is written outside of `home` but Ray's sockets."""

    settings: LocalSettings
    ports: dict[str, int]

    @property
    def home(self) -> Path:
        return self.settings.home.absolute()

    @property
    def keys(self) -> Path:
        return self.home / "keys"

    @property
    def run(self) -> Path:
        return self.home / "run"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def front_door(self) -> str:
        return f"http://127.0.0.1:{self.ports['front_door']}"

    @property
    def ui(self) -> str:
        return f"http://localhost:{self.ports['front_door']}"

    @property
    def inner_host(self) -> str:
        """Where the bus and Ray listen: on loopback, unless other machines shall reach them."""
        return self.settings.node_address or "127.0.0.1"

    @property
    def nats_url(self) -> str:
        return self.settings.nats_url or f"nats://{self.inner_host}:{self.ports['nats']}"

    @property
    def s3_endpoint(self) -> str:
        return self.settings.s3_endpoint or f"127.0.0.1:{self.ports['s3']}"

    @property
    def traefik_api(self) -> str:
        return f"http://127.0.0.1:{self.ports['traefik_api']}"

    @property
    def traefik_dynamic(self) -> Path:
        return self.home / "traefik" / "dynamic"

    @cached_property
    def id(self) -> str:
        """Random, made once: by it a client learns that the installation it talks to is one on its own machine."""
        return secret_file(self.home / "installation-id", secrets.token_hex(16))

    @cached_property
    def ray_folder(self) -> Path:
        """Ray's session folder: in /tmp, as its socket paths must stay under 108 characters."""
        tag = hashlib.sha256(str(self.home).encode()).hexdigest()[:10]
        return Path(f"/tmp/nabla-ray-{os.getuid()}-{tag}")


def open_installation(settings: LocalSettings) -> Installation:
    """The installation in `settings.home`, with its remembered ports; makes the folder when it is new."""
    home = settings.home.absolute()
    for folder in (home, home / "run", home / "logs", home / "keys", home / "data"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Installation(settings, PREFERRED_PORTS | {"front_door": settings.port} | remembered_ports(home))


def remembered_ports(home: Path) -> dict[str, int]:
    return {name: port for name, port in _port_file(home).items() if name in PREFERRED_PORTS}


def _port_file(home: Path) -> dict[str, int]:
    """Ports by name, and as `asked` the front door's in the settings they were claimed for. Unreadable is forgotten."""
    try:
        return dict(json.loads((home / "ports.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def claim_ports(installation: Installation) -> tuple[Installation, list[str]]:
    """The installation with ports that are free now, remembered, and what moved, in words for people.

    Installations of one user never share a port, also when they start at the same moment. Call only while nothing
    of this installation runs.
    """
    settings = installation.settings
    wishes = installation.ports
    if _port_file(installation.home).get("asked", settings.port) != settings.port:
        wishes = wishes | {"front_door": settings.port}
    ports: dict[str, int] = {}
    moved: list[str] = []
    with neighbours(installation.home) as taken:
        for name, wanted in wishes.items():
            inner = settings.node_address if name in ("nats", "ray") else ""
            port = next_free(settings.host if name == "front_door" else inner or "127.0.0.1", wanted, taken)
            if port != wanted and name == "front_door":
                moved.append(f"port {wanted} is taken: using {port}, from now on")
            taken.add(port)
            ports[name] = port
        write_private(installation.home / "ports.json", json.dumps(ports | {"asked": settings.port}, indent=2))
    return Installation(settings, ports), moved


def private_folder(path: Path) -> None:
    """Makes a folder below /tmp, where others could have put one of the same name, or a link, before us.

    Raises:
        InstallationError: somebody did.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise InstallationError(f"{path} is not a folder of yours: remove it, or have its owner do so")


@contextlib.contextmanager
def neighbours(home: Path) -> Iterator[set[int]]:
    """The ports of this user's other installations; nobody else claims any meanwhile.

    The folder is also where this user's client looks for the installations on this machine (`nabla.installations`).
    """
    folder = Path(f"/tmp/nabla-homes-{os.getuid()}")
    private_folder(folder)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        taken: set[int] = set()
        for known in folder.glob("*.home"):
            other = Path(known.read_text())
            if not other.is_dir():
                known.unlink()
            elif other != home:
                taken |= set(remembered_ports(other).values())
        (folder / f"{hashlib.sha256(str(home).encode()).hexdigest()[:16]}.home").write_text(str(home))
        yield taken


def next_free(host: str, wanted: int, taken: set[int]) -> int:
    """The first free port from `wanted` on.

    Raises:
        OSError: none of the next LOOK_AT is free.
    """
    for port in range(wanted, wanted + LOOK_AT):
        if port not in taken and is_free(host, port) and not strangers_socket(port):
            return port
    raise OSError(f"none of the ports {wanted} to {wanted + LOOK_AT - 1} is free on {host}")


def is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def seaweed_sockets(port: int) -> list[Path]:
    """SeaweedFS also listens on sockets in /tmp named by its ports, and leaves them when it is killed."""
    return list(Path("/tmp").glob(f"seaweedfs-*-{port}.sock"))


def strangers_socket(port: int) -> bool:
    """Whether another user's SeaweedFS has left its socket for this port, which we could not replace."""
    return any(socket_file.stat().st_uid != os.getuid() for socket_file in seaweed_sockets(port))


def answers(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something listens."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0
