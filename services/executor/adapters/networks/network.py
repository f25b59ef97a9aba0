"""A sandbox's own network: made, joined, left, and its ways out.

It lives as long as a process holds a descriptor of it (the shims of its attempts, and what runs inside) and no longer:
with the last of them the kernel removes its interfaces, routes, addresses and filters, however that one ended. The
host's address table is what allots addresses: a route that is there is refused a second time, to every installation.

As root a pair of interfaces leads to the host, which forwards and translates. As an ordinary user `pasta` (Debian's
passt) carries each connection as one of that user's own; the network is then made in a user namespace, whose rights
the job has not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from services.executor.adapters.attempts import kernel
from services.executor.adapters.attempts.forward import NOTHING_READY, Listeners, Way, listen_inside
from services.executor.adapters.networks import (
    network_names,
    network_pasta,
    network_proxy,
    network_rules,
    network_sharing,
)
from services.executor.adapters.networks.network_host import interface_exists, own_addresses, run_tool
from services.executor.domain.network import INTERNET, Network, candidate_addresses, interface_name

_WAIT_S = 20.0
_HOST_END, _INNER_END = "02:6e:61:62:00:01", "02:6e:61:62:00:02"
_EXISTS = "File exists"


@dataclass(frozen=True, slots=True)
class ReadyNetwork:
    """A network that was made before it was asked for, for one attempt alone, and what listens at its loopback."""

    descriptor: int
    listeners: Listeners

    @property
    def descriptors(self) -> list[int]:
        return [self.descriptor, *(listener.fileno() for listener in self.listeners.values())]

    def close(self) -> None:
        os.close(self.descriptor)
        for listener in self.listeners.values():
            listener.close()


@dataclass(slots=True)
class OpenNetwork:
    """A network that a sandbox can join: `descriptor` in this process, `path` for other programs.

    `ways` are processes that serve it, to be watched and replaced like those of the front door. `listeners` are there
    already.
    """

    spec: Network
    descriptor: int
    ways: list[Way] = field(default_factory=list)
    listeners: Listeners = field(default_factory=dict)
    _leave: Callable[[], None] = lambda: None

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def close(self) -> None:
        """Give up this process's hold. What else is left goes when the last holder does."""
        self._leave()
        os.close(self.descriptor)


def open_network(
    spec: Network, attempt_id: str, node_dir: Path, ready: ReadyNetwork | None = None
) -> OpenNetwork | None:
    """The network that this attempt's sandbox joins; None where it needs none but its own loopback. Raises OSError.

    Args:
        ready: one such as `spec` asks for, for this attempt.
    """
    if ready is not None:
        return OpenNetwork(spec, ready.descriptor, listeners=ready.listeners)
    if not spec.leads_out and not spec.is_shared:
        return None
    name = spec.gang.name if spec.gang else attempt_id
    make_it = partial(make, spec, name)
    if not spec.is_shared:
        opened = OpenNetwork(spec, make_it())
    else:
        folder = node_dir / "networks"
        leave = partial(network_sharing.leave, folder, name, partial(_close_gate, spec, name))
        opened = OpenNetwork(spec, network_sharing.join_or_make(folder, name, make_it), _leave=leave)
    if spec.leads_out and os.geteuid() != 0:
        try:
            opened.ways.append(network_pasta.carry(opened.descriptor, spec.gang, node_dir / "networks"))
            if spec.gang and spec.peers:
                opened.ways.append(network_pasta.admit_peers(opened.descriptor, spec.gang, node_dir / "networks"))
        except OSError:
            opened.close()
            raise
    return opened


def open_services(spec: Network, network: int, uid: int | None, ready: Listeners = NOTHING_READY) -> list[Way]:
    """What a sandbox with policy `internet` needs besides its way out, served at its loopback. Raises OSError.

    Args:
        ready: what listens there already.
    """
    if spec.policy != INTERNET:
        return []
    if spec.needs_proxy:
        (listener,) = listen_inside(network, [(socket.SOCK_STREAM, network_proxy.PORT)], uid)
        serve = partial(network_proxy.serve, listener, spec.allowed, own_addresses())
    elif spec.leads_out:
        (listener,) = listen_inside(network, [(socket.SOCK_DGRAM, network_names.PORT)], uid, ready)
        serve = partial(network_names.relay_names, listener, network_names.name_servers())
    else:
        return []
    way = Way(serve, [listener.fileno()], uid=uid)
    way.serve()
    return [way]


def variables(spec: Network) -> dict[str, str]:
    """What the job's environment must say of its network."""
    return network_proxy.variables() if spec.needs_proxy else {}


def make(spec: Network, name: str) -> int:
    """A descriptor of a new network; what leads to it from the host is called after `name`. Raises OSError."""
    as_root = os.geteuid() == 0
    interface, address = interface_name(spec, name), ""
    with _Builder(spec, as_root) as builder:
        try:
            if spec.leads_out and as_root:
                address = _tie_to_host(spec, name, interface, builder.network)
            builder.set_up(address)
            if spec.gang and spec.peers and address:
                run_tool("nft", network_rules.gang_gate(spec, spec.gang, interface, address))
        except OSError:
            os.close(builder.network)
            _close_gate(spec, name)
            raise
    return builder.network


def _tie_to_host(spec: Network, name: str, interface: str, network: int) -> str:
    """The host's end of the way out, and the sandbox's address, which nobody else on this host has."""
    if interface_exists(interface):  # of a shim of this attempt that was killed just now
        with contextlib.suppress(OSError):
            run_tool("ip", f"link delete {interface}\n")
        _close_gate(spec, name)
    commands = (
        f"link add {interface} address {_HOST_END} type veth "
        f"peer name eth0 address {_INNER_END} netns /proc/{os.getpid()}/fd/{network}\n"
        f"link set {interface} addrgenmode none up\n"
    )
    for address in candidate_addresses(spec.subnet, name):
        commands += f"route add {address}/32 dev {interface}\n"
        commands += f"neighbor add {address} lladdr {_INNER_END} dev {interface} nud permanent\n"
        try:
            run_tool("ip", commands)
        except OSError as error:
            if _EXISTS not in str(error):
                raise
            commands = ""
        else:
            return address
    raise OSError(f"no address is free for a sandbox in {spec.subnet}")


def _close_gate(spec: Network, name: str) -> None:
    if spec.gang is None or not spec.peers or not spec.leads_out or os.geteuid() != 0:
        return
    for command in network_rules.without_gang_gate(spec.installation, interface_name(spec, name)):
        with contextlib.suppress(OSError):
            run_tool("nft", command)


class _Builder:
    """A forked process that is the new network's first, and sets it up from inside, as its root."""

    def __init__(self, spec: Network, as_root: bool) -> None:
        self._spec = spec
        self._own = own_addresses()
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(_WAIT_S)
        self._pid = os.fork()
        if self._pid == 0:
            self._run(theirs, as_root)
        theirs.close()
        try:
            message, descriptors = kernel.receive(self._channel, 4096, 1)
        except OSError:
            self.__exit__()
            raise
        if not descriptors:
            self.__exit__()
            raise OSError(f"the sandbox's network cannot be made: {message.decode() or 'its builder died'}")
        self.network = descriptors[0]

    def __enter__(self) -> _Builder:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        os.waitpid(self._pid, 0)

    def set_up(self, address: str) -> None:
        """Args: address: the sandbox's towards the host; empty where it is not root who builds."""
        self._channel.send(address.encode() or b"-")
        answer = self._channel.recv(4096).decode()
        if answer != "ok":
            raise OSError(f"the sandbox's network cannot be set up: {answer or 'its builder died'}")

    def _refused(self) -> list[str]:
        peers = set(self._spec.peers)
        return [address for address in self._own if ":" not in address and address not in peers]

    def _run(self, channel: socket.socket, as_root: bool) -> NoReturn:
        try:
            signal.alarm(int(_WAIT_S))
            network = kernel.make_network(as_root)
            _write_kernel_settings(self._spec)
            socket.send_fds(channel, [b"net"], [network])
            if self._spec.leads_out:  # meanwhile the host makes its end
                run_tool("nft", network_rules.inner_wall(self._spec, self._refused()))
            address = channel.recv(64).decode().strip("-")
            run_tool("ip", _inner_links(self._spec, address))
            if self._spec.gang and address:
                run_tool("nft", network_rules.inner_translation(self._spec.gang, address))
            channel.send(b"ok")
        except OSError as error:
            channel.send(str(error).encode()[:4000])
        except BaseException:
            channel.send(traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)


def _inner_links(spec: Network, address: str) -> str:
    inner = spec.gang.node_address if spec.gang else address
    lines = ["link set lo up"]
    if address:
        lines += [
            f"address add {inner}/32 dev eth0",
            "link set eth0 up",
            f"neighbor add {network_rules.ROUTER} lladdr {_HOST_END} dev eth0 nud permanent",
            f"route add {network_rules.ROUTER} dev eth0",
            f"route add default via {network_rules.ROUTER} dev eth0",
        ]
    elif spec.gang and not spec.leads_out:
        lines.append(f"address add {inner}/32 dev lo")
    return "\n".join([*lines, ""])


def _write_kernel_settings(spec: Network) -> None:
    """Of this process's network: IPv4 alone, and the gang's ports for whoever asks for any."""
    settings = {
        "ipv6/conf/default/disable_ipv6": "1",
        "ipv4/ip_unprivileged_port_start": "0",  # the front door's port may be 80, and it is nobody else's here
    }
    if spec.gang:
        settings["ipv4/ip_local_port_range"] = (
            f"{spec.gang.first_free_port or spec.gang.first_port} {spec.gang.last_port}"
        )
    for name, value in settings.items():
        path = Path("/proc/sys/net", name)
        if path.exists():  # a kernel without IPv6 has none to switch off
            path.write_text(value)
