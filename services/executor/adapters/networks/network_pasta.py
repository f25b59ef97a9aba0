"""A way out of a sandbox's network without root: `pasta`, from Debian's passt.

It makes each connection of the sandbox anew, as a connection of its own user on the node. So the sandbox has the node's
address and may use it, and what must not be reached is refused inside (network_rules), before pasta sees it.

What comes in from a gang's peers is not pasta's: of what it accepts for a sandbox, Debian 12's passt loses the answers.
A relay listens on the gang's ports (TCP), takes peers alone, and serves them from inside.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

from services.executor.adapters.attempts import kernel
from services.executor.adapters.attempts.forward import Route, Way, listen, relay
from services.executor.adapters.networks.network_host import find_tool
from services.executor.domain.network import Gang

_WAIT_S = 20.0
_LOOK_S = 0.002
_ROUND_S = 0.5
# IPv4 alone; nothing of the node's loopback or behind the name of its router; no port, either way, unless told.
_OPTIONS = (
    *("--foreground", "--quiet", "--config-net", "--ipv4-only", "--no-map-gw", "--no-ra", "--no-ndp", "--no-dhcp"),
    *("--no-dhcpv6", "--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none"),
)


def carry(network: int, gang: Gang | None, folder: Path) -> Way:
    """Have pasta carry what leaves the network, and wait until it does. Raises OSError.

    Args:
        gang: its ranks on this node share the network, and pasta: when the one that runs it leaves, another does.
    """
    way = Way(partial(_stand_by, network, gang, folder), [network])
    way.serve()
    deadline = time.monotonic() + _WAIT_S
    while not _has_way_out(network):
        if os.waitpid(way.pid, os.WNOHANG)[0]:
            raise OSError("pasta ended before the sandbox had its network")
        if time.monotonic() > deadline:
            os.kill(way.pid, signal.SIGKILL)
            os.waitpid(way.pid, 0)
            raise OSError(f"pasta did not give the sandbox its network within {_WAIT_S:.0f} s")
    return way


def admit_peers(network: int, gang: Gang, folder: Path) -> Way:
    """Have the peers' nodes reach the gang's ports in the network. Raises OSError."""
    way = Way(partial(_stand_at_the_gate, network, gang, folder), [network])
    way.serve()
    return way


def _stand_at_the_gate(network: int, gang: Gang, folder: Path) -> None:
    _take_turn(folder / f"{gang.name}.gate")
    shim, peers = os.getppid(), frozenset(gang.peer_addresses)
    routes = [
        Route(listen(gang.node_address, port), socket.AF_INET, (gang.node_address, port), peers)
        for port in range(gang.first_port, gang.last_port + 1)
    ]
    kernel.enter_network(network)
    kernel.end_with_parent(signal.SIGKILL, shim)  # it was forgotten on the way
    relay(routes)


def _take_turn(path: Path) -> None:
    """Wait for the process of another rank on this node to be gone; held until this one is."""
    fcntl.flock(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), fcntl.LOCK_EX)


def _stand_by(network: int, gang: Gang | None, folder: Path) -> None:
    """In a process of its own: returns when pasta has ended."""
    if gang:
        _take_turn(folder / f"{gang.name}.pasta")
    program, me = find_tool("pasta"), os.getpid()
    if program is None:
        raise FileNotFoundError("pasta is not installed")
    inside = _process_inside(network)
    command = [program, *_OPTIONS, "--userns", f"/proc/{inside}/ns/user", "--netns", f"/proc/{inside}/ns/net"]
    subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,
        preexec_fn=partial(kernel.end_with_parent, signal.SIGKILL, me),
    )


def _process_inside(network: int) -> int:
    """One that does nothing but live there: pasta, once it is in the user namespace, opens only what is in it too."""
    me = os.getpid()
    ready, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kernel.enter_network(network)
            kernel.end_with_parent(signal.SIGKILL, me)
            os.write(ready_write, b"1")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(ready_write)
    if not os.read(ready, 1):
        raise OSError("the sandbox's network cannot be entered")
    os.close(ready)
    return pid


def _has_way_out(network: int) -> bool:
    """Whether the network has its default route now, or within a moment: looked at from inside, in a fork."""
    looker = os.fork()
    if looker == 0:
        try:
            kernel.enter_network(network)
            deadline = time.monotonic() + _ROUND_S
            while not (found := _default_route()) and time.monotonic() < deadline:
                time.sleep(_LOOK_S)
            os._exit(0 if found else 1)
        finally:
            os._exit(1)
    return os.waitpid(looker, 0)[1] == 0


def _default_route() -> bool:
    lines = Path("/proc/self/net/route").read_text().splitlines()[1:]
    return any(line.split()[1] == "00000000" for line in lines)
