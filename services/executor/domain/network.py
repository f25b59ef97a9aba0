"""What a sandbox may reach: policies, classes of reach, which addresses are public, and names that cannot collide.

Three policies, chosen by the job or the installation:

    none       nothing, not even the front door
    platform   the front door and the gang's peers
    internet   these, and public addresses

Three classes of reach, which a node has or has not:

    full       a network of its own with a way out: all of the above
    loopback   loopback only: the front door by a relay, the internet by an HTTP proxy, no peers on other nodes
    host       no walls: the node's own network, which no policy bounds
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

Policy = Literal["none", "platform", "internet"]
Reach = Literal["full", "loopback", "host"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
NONE, PLATFORM, INTERNET = POLICIES
FULL, LOOPBACK, HOST = get_args(Reach)

# IANA's special-purpose registry and multicast: nothing in it is a public server. Carriers' shared addresses
# (100.64.0.0/10) are where sandboxes themselves live, 169.254.0.0/16 where clouds keep their metadata.
NOT_PUBLIC_4 = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
    *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
)
# Of IPv6 only 2000::/3 is handed out; in it, documentation and what embeds an IPv4 address (Teredo, 6to4).
PUBLIC_6 = "2000::/3"
NOT_PUBLIC_6 = ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")

_TAG = re.compile(r"[a-z2-7]{4}")
_INTERFACE_BYTES = 15
_LETTERS = "abcdefghijklmnopqrstuvwxyz234567"


class MalformedNetwork(ValueError):
    """A network that cannot be; the text says which field and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gang:
    """What the ranks of one gang on one node share: a network namespace of this name, which has the node's own
    address, and in it `first_port` to `last_port`, to which the peers' nodes reach 1:1, and this one to theirs.

    Args:
        first_free_port: from here on ports are given to whoever asks for any; those before it have owners, and who
            waits for one of them to listen must not come upon himself there.
    """

    name: str
    node_address: str
    peer_addresses: list[str] = field(default_factory=list)
    first_port: int
    last_port: int
    first_free_port: int = 0

    def __post_init__(self) -> None:
        for address in (self.node_address, *self.peer_addresses):
            if not _is_ipv4(address):
                raise MalformedNetwork(f"the gang's node address {address!r} is not an IPv4 address")
        if not 1024 <= self.first_port <= self.last_port < 65536:
            raise MalformedNetwork(f"the gang's ports {self.first_port} to {self.last_port} are not a range from 1024")


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """The network of one attempt on one node.

    Args:
        installation: tells this installation's sandboxes from those of others on the same host; see `installation_tag`.
        subnet: where sandboxes get their addresses from; never seen outside of the node.
        allowed: networks that count as public although they are not: a company's own package mirror.
    """

    policy: Policy = "platform"
    reach: Reach = "loopback"
    installation: str = "self"
    subnet: str = "100.96.0.0/16"
    allowed: list[str] = field(default_factory=list)
    gang: Gang | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise MalformedNetwork(f"network is {self.policy!r}, not one of {', '.join(POLICIES)}")
        if self.reach not in get_args(Reach):
            raise MalformedNetwork(f"the network's reach is {self.reach!r}, not one of {', '.join(get_args(Reach))}")
        if not _TAG.fullmatch(self.installation):
            raise MalformedNetwork(f"the installation's tag {self.installation!r} is not four letters")
        for text in (self.subnet, *self.allowed):
            if _checked_network(text).version != 4:
                raise MalformedNetwork(f"{text} is not a network of IPv4, which alone sandboxes have")

    @property
    def leads_out(self) -> bool:
        """Whether the sandbox needs a way out of its own: without, loopback and relays do."""
        outside = self.policy == INTERNET or (self.policy == PLATFORM and self.peers)
        return self.reach == FULL and bool(outside)

    @property
    def is_shared(self) -> bool:
        """Whether several attempts' sandboxes may join one network."""
        return self.gang is not None and self.reach != HOST

    @property
    def peers(self) -> list[str]:
        return [] if self.gang is None or self.policy == NONE else self.gang.peer_addresses

    @property
    def needs_proxy(self) -> bool:
        return self.reach == LOOPBACK and self.policy == INTERNET


def checked_policy(text: str) -> Policy:
    """The policy of this name. Raises MalformedNetwork."""
    for policy in POLICIES:
        if policy == text:
            return policy
    raise MalformedNetwork(f"network is {text!r}, not one of {', '.join(POLICIES)}")


def refusal(policy: str, reach: str, node_count: int = 1) -> str:
    """Why a job with this policy cannot run where sandboxes reach so far, with what to do; empty when it can.

    Args:
        policy: what the job itself asks for; empty when it leaves it to the installation.
        node_count: over how many nodes the job is spread.
    """
    if policy in (NONE, PLATFORM) and reach == HOST:
        return (
            f"network {policy} cannot be kept here: jobs have no walls (class process). Leave --network out, or "
            "restore isolation; `nabla status` says how"
        )
    if node_count > 1 and reach == LOOPBACK:
        return (
            "its ranks could not reach each other: sandboxes here have loopback only. Run it on one node, or give "
            "sandboxes a network: `apt-get install passt`, or run the platform as root with nftables and iproute2"
        )
    if node_count > 1 and policy == NONE:
        return "network none leaves its ranks without each other: ask for network platform, or run it on one node"
    return ""


def is_public(address: str, allowed: Iterable[str] = (), own: Iterable[str] = ()) -> bool:
    """Whether a sandbox with policy `internet` may reach this address.

    Args:
        own: the node's own addresses, public ones too: what listens there is the platform's.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if str(ip) in own:
        return False
    if any(ip in _checked_network(text) for text in allowed):
        return True
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in ipaddress.ip_network(text) for text in NOT_PUBLIC_4)
    return ip in ipaddress.ip_network(PUBLIC_6) and not any(ip in ipaddress.ip_network(text) for text in NOT_PUBLIC_6)


def installation_tag(node_dir: str) -> str:
    """Four letters that tell the installations of one host apart: each has a node folder of its own."""
    return _short(node_dir, 4)


def interface_prefix(installation: str) -> str:
    """How the host's ends of all sandboxes of an installation begin."""
    return f"nb{installation}"


def interface_name(network: Network, name: str) -> str:
    """The host's end of a sandbox's way out: its policy is in the name, so that one rule holds for all of a policy."""
    beginning = f"{interface_prefix(network.installation)}{network.policy[0]}"
    return beginning + _short(name, _INTERFACE_BYTES - len(beginning))


def candidate_addresses(subnet: str, name: str, count: int = 64) -> Iterator[str]:
    """Addresses to try for a sandbox, one after the other, until one is free: others start elsewhere."""
    network = ipaddress.IPv4Network(subnet)
    usable = max(1, network.num_addresses - 2)
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    for number in range(min(count, usable)):
        yield str(network.network_address + 1 + (start + number) % usable)


def _short(text: str, length: int) -> str:
    return "".join(_LETTERS[byte % 32] for byte in hashlib.sha256(text.encode()).digest()[:length])


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _checked_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise MalformedNetwork(f"{text!r} is not a network such as 10.1.0.0/16: {error}") from None
