"""Who may enter a running job, and how: said in a ticket, which one connection uses up.

Between machines the front door comes by TLS, and says by the name that it asks the node for where it wants to go: to
the door, or to a port that a job has opened. So a connection has one end from its beginning.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field

SSH, TCP = "ssh", "tcp"
DOOR = "door"
_JOBS_PORT = re.compile(r"(\d{1,5})-([a-z0-9-]{1,50})")
_PUBLIC_KEY = re.compile(r"ssh-ed25519 [A-Za-z0-9+/]{40,200}={0,2}( [ -~]{0,200})?")


@dataclass(frozen=True, slots=True)
class DoorTicket:
    """What its holder may do, once.

    Args:
        kind: ssh, a session with the SSH server in the sandbox; tcp, a connection to 127.0.0.1:port in it.
        public_key: with which the holder signs in to the SSH server, in OpenSSH's form.
        holder: the user's id, for the log.
    """

    attempt_id: str
    kind: str
    port: int = 0
    public_key: str = ""
    holder: str = ""
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))


def why_not(kind: str, port: int, public_key: str) -> tuple[str, str, str]:
    """The field that is wrong, why, and what to send instead; the field is empty when nothing is."""
    if kind not in {SSH, TCP}:
        return "kind", f"{kind[:40]!r} is no way into a job.", "Use ssh or tcp."
    if kind == TCP and not 0 < port < 65_536:
        return "port", f"{port} is not a port.", "Use 1 to 65535."
    if kind == SSH and not _PUBLIC_KEY.fullmatch(public_key.strip()):
        return "public_key", "The key is not a public one of SSH.", "Send the line of an ssh-ed25519 .pub file."
    return "", "", ""


def name_below(node_id: str, label: str) -> str:
    """A name under which this node answers to the front door."""
    return f"{label}.{node_id.lower()}.nodes.nabla"


def name_of_port(node_id: str, execution_id: str, port: int) -> str:
    """The name of a port that a job has opened; it is no other job's, ever."""
    return name_below(node_id, f"{port}-{execution_id}")


def port_named(name: str) -> tuple[str, int] | None:
    """The execution and its port that a name means; None for any other name."""
    found = _JOBS_PORT.fullmatch(name.partition(".")[0])
    return (found[2], int(found[1])) if found else None
