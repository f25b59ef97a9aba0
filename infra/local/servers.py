"""The servers that a single machine needs beside the services: how each is started, and how one knows it is up."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.credentials import ray_token, s3_keys, write_private
from infra.local.installation import Installation, answers, private_folder

BIN = Path(sys.executable).parent
# The oldest versions that have what we rely on, and the fixes that the security catalogue asks for.
OLDEST = {"nats-server": (2, 12, 6), "weed": (4, 48), "traefik": (3, 0)}
VERSION_ARGUMENT = {"nats-server": "--version", "weed": "version", "traefik": "version"}


class ServerMissingError(Exception):
    """A program is not there or too old: what happened, and what to do."""


@dataclass(frozen=True)
class Server:
    """A program to supervise.

    Args:
        ready: whether it answers now.
        stop_s: how long it may take to end before it is killed.
    """

    name: str
    command: list[str]
    ready: Callable[[], bool]
    env: dict[str, str] = field(default_factory=dict)
    stop_s: float = 10.0


def find_program(name: str, configured: str) -> str:
    """The program's path: from the settings, else PATH, else the wheel installed beside this Python.

    Raises:
        ServerMissingError: it is nowhere, or older than OLDEST says.
    """
    found = [configured] if configured else [path for path in (shutil.which(name), str(BIN / name)) if path]
    there = [path for path in found if Path(path).exists()]
    if not there:
        raise ServerMissingError(f"There is no {found[-1]}: run `make up`, or name another {name} in nabla.toml")
    for path in there:
        if program_version(name, path) >= OLDEST[name]:
            return path
    version = ".".join(map(str, program_version(name, there[0]))) or "unknown"
    wanted = ".".join(map(str, OLDEST[name]))
    raise ServerMissingError(
        f"The version of {there[0]} is {version}; Nabla needs {name} {wanted} or newer: "
        f"install that, or take the name of this one out of nabla.toml"
    )


def program_version(name: str, path: str) -> tuple[int, ...]:
    """What the program says of itself; () when it does not start or says nothing."""
    try:
        shown = subprocess.run([path, VERSION_ARGUMENT[name]], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", shown.stdout + shown.stderr)
    return tuple(int(part) for part in found.groups(default="0")) if found else ()


def nats_server(installation: Installation, config: str) -> Server:
    file = installation.run / "nats.json"
    write_private(file, config)
    program = find_program("nats-server", installation.settings.nats_server)
    port = installation.ports["nats"]
    return Server("nats", [program, "-c", str(file)], lambda: answers(port, installation.inner_host))


def seaweed(installation: Installation) -> Server:
    """S3, filer, volume and master in one process, on loopback, with one identity.

    Without the identity file it would accept anybody; telemetry and the table catalogues are off.
    """
    access, secret = s3_keys(installation.keys)
    identity = {
        "name": "nabla",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    write_private(installation.run / "s3.json", json.dumps({"identities": [identity]}))
    folder = installation.home / "data" / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    ports = installation.ports
    command = [
        find_program("weed", installation.settings.weed),
        "-logtostderr=true",
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={ports['master']}",
        f"-master.port.grpc={ports['master_grpc']}",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        f"-volume.port={ports['volume']}",
        f"-volume.port.grpc={ports['volume_grpc']}",
        "-volume.max=100",
        # It would wait ten seconds for other servers to notice that it leaves.
        "-volume.preStopSeconds=0",
        "-filer",
        f"-filer.port={ports['filer']}",
        f"-filer.port.grpc={ports['filer_grpc']}",
        "-s3",
        f"-s3.port={ports['s3']}",
        f"-s3.port.grpc={ports['s3_grpc']}",
        f"-s3.config={installation.run / 's3.json'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    # Its filer waits ten seconds for streams that its own S3 part keeps open. What it has acknowledged is written.
    return Server("s3", command, lambda: answers(ports["s3"]), stop_s=2.0)


def traefik(installation: Installation) -> Server:
    installation.traefik_dynamic.mkdir(parents=True, exist_ok=True)
    config = {
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
        "entryPoints": {
            "web": {
                "address": f"{installation.settings.host}:{installation.ports['front_door']}",
                # Uploads to the object store take as long as they take.
                "transport": {"respondingTimeouts": {"readTimeout": "0s"}},
            },
            "traefik": {"address": f"127.0.0.1:{installation.ports['traefik_api']}"},
        },
        "api": {"insecure": True, "dashboard": False},
        "providers": {
            "providersThrottleDuration": "100ms",
            "file": {"directory": str(installation.traefik_dynamic), "watch": True},
        },
        "log": {"level": "WARN"},
    }
    # Traefik reads YAML, of which JSON is a part.
    file = installation.run / "traefik.yml"
    file.write_text(json.dumps(config, indent=2))
    program = find_program("traefik", installation.settings.traefik)
    api = installation.ports["traefik_api"]
    return Server("traefik", [program, f"--configFile={file}"], lambda: answers(api))


def ray_environment(installation: Installation) -> dict[str, str]:
    """What Ray and everyone who talks to it need: the token, and no phoning home."""
    return {
        **_ray_token_environment(installation),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        # Workers are started when an agent needs one; by default a driver makes Ray start one for each CPU.
        "RAY_prestart_worker_first_driver": "0",
    }


def _ray_token_environment(installation: Installation) -> dict[str, str]:
    """A cluster of others has a token of its own, or none: from the settings, else as any driver finds it."""
    settings, file = installation.settings, installation.keys / "ray-token"
    if settings.ray_token:
        file = installation.keys / "their-ray-token"
        write_private(file, settings.ray_token)
    elif settings.ray_address:
        return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    else:
        ray_token(installation.keys)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


def ray_head(installation: Installation) -> Server:
    """A Ray head that stays in the foreground and ends when one of its processes does."""
    port = installation.ports["ray"]
    private_folder(installation.ray_folder)
    command = [
        sys.executable,
        "-m",
        "services.executor.adapters.cluster.loopback",
        "start",
        "--head",
        "--block",
        f"--node-ip-address={installation.inner_host}",
        f"--port={port}",
        f"--temp-dir={installation.ray_folder}",
        f"--dashboard-agent-listen-port={installation.ports['ray_agent']}",
        "--include-dashboard=false",
        "--include-log-monitor=false",
        # The autoscaler's: this head has no nodes to add.
        "--no-monitor",
        "--disable-usage-stats",
        f"--object-store-memory={object_store_bytes()}",
        *_amounts(installation),
    ]
    # Ray would wait half a minute for the node agent, which lives as long as Ray does.
    env = ray_environment(installation) | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    return Server("ray", command, lambda: answers(port, installation.inner_host), env=env, stop_s=20.0)


def object_store_bytes() -> int:
    """Little: data travel by S3, not by Ray's object store; and /dev/shm may be tiny in a container."""
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    return max(78_643_200, min(200_000_000, free // 3))


def _amounts(installation: Installation) -> list[str]:
    amounts = []
    if installation.settings.cpus:
        amounts.append(f"--num-cpus={installation.settings.cpus}")
    if installation.settings.gpus >= 0:
        amounts.append(f"--num-gpus={installation.settings.gpus}")
    return amounts
