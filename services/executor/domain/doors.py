"""Who may enter a running job, and how: said in a ticket, which one connection uses up."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field

SSH, TCP = "ssh", "tcp"
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
