"""The host's side of sandboxes' networks: the tools, its own addresses, its wall, and what a killed shim left there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from services.executor.adapters.networks import network_rules
from services.executor.domain.network import interface_prefix

_TOOL_PATH = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin:/usr/local/bin"
_TOOL_S = 20.0
# In which the kernel removes networks that nobody holds any more, also on a busy machine.
GOING_S = 10.0
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
_ARGUMENTS = {"ip": ["-batch", "-"], "nft": ["-f", "-"]}


def find_tool(name: str) -> str | None:
    """Where a program is; ordinary users often have no /sbin on their PATH."""
    return shutil.which(name, path=_TOOL_PATH)


def run_tool(name: str, commands: str) -> None:
    """Have `ip` or `nft` carry out these commands, in this process's network. Raises OSError with what it says."""
    program = find_tool(name)
    if program is None:
        raise FileNotFoundError(f"{name} is not installed")
    try:
        done = subprocess.run(
            [program, *_ARGUMENTS[name]], input=commands, text=True, capture_output=True, timeout=_TOOL_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{name} did not end within {_TOOL_S:.0f} s") from None
    if done.returncode != 0:
        raise OSError(f"{name}: {done.stderr.strip() or done.returncode}")


def own_addresses() -> list[str]:
    """All of this host's IPv4 and IPv6 addresses, as the kernel's own tables have them."""
    four = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", _read("/proc/self/net/fib_trie"))
    six = [bytes.fromhex(line.split()[0]) for line in _read("/proc/self/net/if_inet6").splitlines()]
    return sorted({*four, *(socket.inet_ntop(socket.AF_INET6, address) for address in six)})


def interface_exists(name: str) -> bool:
    return name in {known for _, known in socket.if_nameindex()}


def raise_wall(installation: str, subnet: str, allowed: Sequence[str]) -> None:
    """Have the host forward for sandboxes, and for them alone, and refuse them all that no rule allows. As root.

    The wall stands before the forwarding begins. A wall that stands already is left alone, with its gangs' gates.
    Raises OSError.
    """
    if not wall_stands(installation):
        run_tool("nft", network_rules.outer_wall(installation, subnet, allowed))
    if _FORWARDING.read_text().strip() == "0":
        run_tool("nft", network_rules.guard(_outside()))
        _FORWARDING.write_text("1")


def wall_stands(installation: str) -> bool:
    """Somebody may have flushed the host's rules: then sandboxes' own still hold, but nothing is translated."""
    return bool(_nft("list", "chain", "ip", network_rules.table_of(installation), "postrouting"))


def take_wall_down(installation: str, within_s: float = GOING_S) -> None:
    """Remove the installation's tables, unless one of its sandboxes lives, or is being removed for longer than this.

    Forwarding stays on, and with it the guard that keeps the host from being a router: others may rely on it by now.
    """
    prefix = interface_prefix(installation)
    deadline = time.monotonic() + within_s  # the kernel takes a moment to remove those of sandboxes that have ended
    while any(name.startswith(prefix) for _, name in socket.if_nameindex()):
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)
    table = network_rules.table_of(installation)
    for family, name in _tables():
        if name == table or name.startswith(f"{table}_"):
            _delete_table(family, name)


def close_dead_gates(installation: str) -> None:
    """Remove gangs' gates whose interface is gone."""
    table = network_rules.table_of(installation)
    present = {name for _, name in socket.if_nameindex()}
    seen = {name.removeprefix(f"{table}_") for _, name in _tables() if name.startswith(f"{table}_")}
    for interface in seen - present:
        for command in network_rules.without_gang_gate(installation, interface):
            with contextlib.suppress(OSError):
                run_tool("nft", command)


def foreign_refusal() -> str:
    """Which other filter of this host would drop what sandboxes send, or an empty string."""
    listed = json.loads(_nft("-j", "list", "chains") or "{}").get("nftables", [])
    for chain in (entry["chain"] for entry in listed if "chain" in entry):
        ours = chain["table"].startswith("nabla_")
        if chain.get("hook") == "forward" and chain.get("policy") == "drop" and chain["family"] != "ip6" and not ours:
            return f"{chain['family']} {chain['table']} {chain['name']}"
    return ""


def _outside() -> list[str]:
    """What may lead to neighbours: all that is there before the first sandbox. Others' bridges come with forwarding."""
    return sorted(name for _, name in socket.if_nameindex() if name != "lo" and not name.startswith("nb"))


def _tables() -> list[tuple[str, str]]:
    words = [line.split() for line in _nft("list", "tables").splitlines()]
    return [(word[1], word[2]) for word in words if len(word) == 3]


def _delete_table(family: str, name: str) -> None:
    with contextlib.suppress(OSError):
        run_tool("nft", f"delete table {family} {name}\n")


def _nft(*arguments: str) -> str:
    program = find_tool("nft")
    if program is None or os.geteuid() != 0:
        return ""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_TOOL_S, check=False)
    return done.stdout if done.returncode == 0 else ""


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""
