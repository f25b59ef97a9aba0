"""Where jobs may run without walls: class `process` is for one person's own machine, and for nothing else."""

from __future__ import annotations

import ipaddress

BWRAP, PROCESS = "bwrap", "process"


def refusal(isolation: str, host: str, team_number: int) -> str:
    """Why no job may run in this class here, with what to do; empty when one may.

    Args:
        host: where the installation listens.
        team_number: of the team that asks, in the order in which teams came. A second one means a second person.
    """
    if isolation != PROCESS:
        return ""
    if not is_loopback(host):
        return (
            f"jobs cannot be isolated here (class process), and Nabla listens on {host}: only an installation on "
            'loopback may run them like this. Set host = "127.0.0.1", or restore isolation; `nabla status` says how'
        )
    if team_number > 1:
        return (
            "jobs cannot be isolated here (class process), so that only the first team may run them: yours could "
            "read its files. Restore isolation; `nabla status` says how"
        )
    return ""


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
