"""The packet filter's side of a sandbox's network, as texts for `nft -f`.

Two walls that do not know of each other. The inner one is loaded in the sandbox's own network, where the job has no
capability; it goes with the network. The outer one is the host's: one table for an installation, which judges by the
names of interfaces, refuses what no rule allows, and needs no change for a sandbox that comes or goes. Only gangs add
to it, by their interface's name, which is never used for another: what a killed shim leaves there lets nobody through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.executor.domain.network import INTERNET, NOT_PUBLIC_4, Gang, Network, interface_prefix

ROUTER = "169.254.1.1"  # what a sandbox takes for its router; nobody has the address

_PORTS = "meta l4proto {{ tcp, udp }} th dport {first}-{last}"


def inner_wall(network: Network, own_addresses: Iterable[str]) -> str:
    """What leaves and enters one sandbox's network.

    Args:
        own_addresses: the node's, which are refused even where they are public.
    """
    out, into = _gang_rules(network)
    if network.policy == INTERNET:
        out += [*_accepting("ip daddr", network.allowed), "ip daddr != @refused accept"]
    return f"""
table inet nabla {{
  set refused {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {", ".join(NOT_PUBLIC_4)} }}; }}
  set own {{ type ipv4_addr; {_elements(own_addresses)} }}
  chain output {{
    type filter hook output priority filter; policy drop;
    oifname "lo" accept
    ct state established,related accept
    meta nfproto ipv6 reject with icmpv6 admin-prohibited
    ip daddr @own reject with icmp admin-prohibited
    {_lines(out)}
    reject with icmpx admin-prohibited
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state established,related accept
    {_lines(into)}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
  }}
}}
"""


def inner_translation(gang: Gang, address: str) -> str:
    """Within a gang's sandbox only the node's address exists; its own, `address`, is for the way through the host."""
    return f"""
table ip nabla_names {{
  chain prerouting {{
    type nat hook prerouting priority dstnat;
    ip daddr {address} dnat to {gang.node_address}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    oifname != "lo" ip saddr {gang.node_address} snat to {address}
  }}
}}
"""


def table_of(installation: str) -> str:
    return f"nabla_{installation}"


def outer_wall(installation: str, subnet: str, allowed: Sequence[str]) -> str:
    """The host's table for all sandboxes of an installation. Loading it replaces an earlier one, and gangs' rules."""
    table, ours = table_of(installation), f'"{interface_prefix(installation)}*"'
    internet = f'"{interface_prefix(installation)}{INTERNET[0]}*"'
    return f"""
table inet {table}
delete table inet {table}
table inet {table} {{
  set refused {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {", ".join(NOT_PUBLIC_4)} }}; }}
  map from_gang {{ type ifname : verdict; }}
  map to_gang {{ type ifname : verdict; }}
  chain input {{
    type filter hook input priority filter - 1;
    iifname {ours} drop
  }}
  chain output {{
    type filter hook output priority filter - 1;
    oifname {ours} ct state established,related accept
    oifname {ours} drop
  }}
  chain forward {{
    type filter hook forward priority filter - 1;
    iifname {ours} jump from_sandbox
    oifname {ours} jump to_sandbox
  }}
  chain from_sandbox {{
    meta nfproto ipv6 drop
    oifname "nb*" drop
    ct state established,related accept
    iifname vmap @from_gang
    iifname != {internet} drop
    {_lines(_accepting("ip daddr", allowed))}
    ip daddr @refused drop
    accept
  }}
  chain to_sandbox {{
    ct state established,related accept
    ct status dnat oifname vmap @to_gang
    drop
  }}
}}
table ip {table}
delete table ip {table}
table ip {table} {{
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    ip saddr {subnet} oifname != "nb*" masquerade
  }}
}}
"""


def guard(outside: Sequence[str]) -> str:
    """For a host that forwards nothing until Nabla has it do so: it becomes no router for its neighbours.

    Args:
        outside: its interfaces to them.
    """
    names = ", ".join(f'"{name}"' for name in outside)
    return f"""
table inet nabla_guard
delete table inet nabla_guard
table inet nabla_guard {{
  chain forward {{
    type filter hook forward priority filter - 2;
    ct state established,related accept
    ct status dnat accept
    {f"iifname {{ {names} }} drop" if outside else ""}
  }}
}}
"""


def gang_gate(network: Network, gang: Gang, interface: str, address: str) -> str:
    """The peers' nodes reach this sandbox on the gang's ports, and it theirs."""
    table, peers = table_of(network.installation), f"{{ {', '.join(gang.peer_addresses)} }}"
    ports = _ports(gang)
    return f"""
table inet {table} {{
  chain out_{interface} {{ ip daddr {peers} {ports} accept; }}
  chain in_{interface} {{ ip saddr {peers} {ports} accept; }}
}}
add element inet {table} from_gang {{ "{interface}" : jump out_{interface} }}
add element inet {table} to_gang {{ "{interface}" : jump in_{interface} }}
table ip {table}_{interface} {{
  chain prerouting {{
    type nat hook prerouting priority dstnat - 1;
    ip saddr {peers} ip daddr {gang.node_address} {ports} dnat to {address}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat - 1;
    ip saddr {address} ip daddr {peers} snat to {gang.node_address}
  }}
}}
"""


def without_gang_gate(installation: str, interface: str) -> list[str]:
    """What takes a gate away, each by itself: a gate may be there in parts."""
    table = table_of(installation)
    return [
        f"delete table ip {table}_{interface}",
        f'delete element inet {table} from_gang {{ "{interface}" }}',
        f'delete element inet {table} to_gang {{ "{interface}" }}',
        f"delete chain inet {table} out_{interface}",
        f"delete chain inet {table} in_{interface}",
    ]


def _gang_rules(network: Network) -> tuple[list[str], list[str]]:
    if network.gang is None or not network.peers:
        return [], []
    peers = f"{{ {', '.join(network.peers)} }}"
    ports = _ports(network.gang)
    return [f"ip daddr {peers} {ports} accept"], [f"ip saddr {peers} {ports} accept"]


def _ports(gang: Gang) -> str:
    return _PORTS.format(first=gang.first_port, last=gang.last_port)


def _accepting(field: str, networks: Sequence[str]) -> list[str]:
    return [f"{field} {{ {', '.join(networks)} }} accept"] if networks else []


def _elements(addresses: Iterable[str]) -> str:
    listed = ", ".join(addresses)
    return f"elements = {{ {listed} }};" if listed else ""


def _lines(rules: Iterable[str]) -> str:
    return "\n    ".join(rules)
