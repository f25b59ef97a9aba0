"""How far sandboxes' networks go on this node: tried out, as it is what the job will meet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from services.executor.adapters.attempts.attempt_folder import Isolation
from services.executor.adapters.networks import network_host
from services.executor.domain.network import FULL, HOST, LOOPBACK, Network, Reach

_PROBE_S = 60.0
_AS_ROOT = {"ip": "iproute2", "nft": "nftables"}
_AS_USER = {"ip": "iproute2", "nft": "nftables", "pasta": "passt"}


@dataclass(frozen=True, slots=True)
class NetworkProbe:
    """What sandboxes have, and why it is not more, with what would change it; "" for full."""

    reach: Reach
    reason: str = ""


def probe(isolation: Isolation, network: Network) -> NetworkProbe:
    """Raises the host's wall on the way, where it is root who asks: no network may be there before it."""
    if isolation == "process":
        return NetworkProbe(HOST, "jobs without walls have the machine's own network")
    as_root = os.geteuid() == 0
    missing = [name for tool, name in (_AS_ROOT if as_root else _AS_USER).items() if not network_host.find_tool(tool)]
    if missing:
        return NetworkProbe(LOOPBACK, f"`apt-get install {' '.join(sorted(set(missing)))}` gives them one of their own")
    if as_root:
        foreign = network_host.foreign_refusal()
        if foreign:
            return NetworkProbe(
                LOOPBACK, f"the host's filter {foreign!r} drops what is forwarded, and Nabla changes no other's filter"
            )
        try:
            network_host.raise_wall(network.installation, network.subnet, network.allowed)
        except OSError as error:
            return NetworkProbe(LOOPBACK, f"the host's filter cannot be set up: {error}")
    failure = _try_apart(replace(network, policy="internet", reach="full"))
    return NetworkProbe(LOOPBACK, failure) if failure else NetworkProbe(FULL)


def in_words(found: NetworkProbe) -> str:
    """The network's part of what `nabla status` says of a node."""
    return f"network: {found.reach}" + (f" ({found.reason})" if found.reason else "")


def open_and_close(text: str) -> str:
    """In a process of its own: why a network such as this cannot be made, or an empty string."""
    from services.executor.adapters.networks.network import open_network

    try:
        opened = open_network(Network(**json.loads(text)), "probe", Path("/"))
    except OSError as error:
        return str(error)
    if opened is not None:
        for way in opened.ways:
            os.kill(way.pid, 9)
            os.waitpid(way.pid, 0)
        opened.close()
    return ""


def _try_apart(network: Network) -> str:
    """In a fresh interpreter: the caller may have threads, and a process with threads must not fork."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from services.executor.adapters.networks.network_probe import open_and_close;"
        "print(open_and_close(sys.argv[2]))"
    )
    root = str(Path(__file__).resolve().parents[4])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, root, json.dumps(asdict(network))],
            env={},
            capture_output=True,
            text=True,
            timeout=_PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"making one took more than {_PROBE_S:.0f} s"
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()[-500:] or "the probe died"
