"""DoorTickets: who may enter which running attempt now, and how. The executor issues them, each node's door reads them.

A ticket is a Fernet token (AES and HMAC under a key that executor and agents share): whoever carries it can neither
read nor change nor prolong it. It holds for a minute; that it is used once is the door's to see to.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from libs.common.errors import NablaError
from services.executor.domain.doors import DoorTicket

HOLDS_S = 60


class TicketRefused(NablaError):
    """The door stays shut; the text says why, for people."""


class FernetTickets:
    """Issues and reads tickets under one key of 32 bytes."""

    hold_s = HOLDS_S

    def __init__(self, key: bytes, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._fernet = Fernet(base64.urlsafe_b64encode(key))
        self._key = key

    def issue(self, ticket: DoorTicket) -> str:
        return self._fernet.encrypt(json.dumps(asdict(ticket)).encode()).decode()

    def read(self, text: str) -> DoorTicket:
        """Raises TicketRefused."""
        try:
            said = json.loads(self._fernet.decrypt_at_time(text.encode(), HOLDS_S, int(self._clock())))
        except (InvalidToken, UnicodeEncodeError):
            raise TicketRefused("the ticket is not one of ours, or is older than a minute") from None
        return _ticket(said)

    def host_key(self, attempt_id: str) -> Ed25519PrivateKey:
        """The attempt's SSH host key: the same wherever it is asked for, so that a client can pin it beforehand."""
        seed = hmac.new(self._key, f"host key of {attempt_id}".encode(), hashlib.sha256).digest()
        return Ed25519PrivateKey.from_private_bytes(seed)

    def host_key_text(self, attempt_id: str) -> bytes:
        """Its private half in OpenSSH's form, for the SSH server alone."""
        return self.host_key(attempt_id).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())

    def host_key_line(self, attempt_id: str) -> str:
        """Its public half as a line of known_hosts has it."""
        public = self.host_key(attempt_id).public_key()
        return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _ticket(said: Mapping[str, object]) -> DoorTicket:
    ticket = DoorTicket(**said)  # type: ignore[arg-type]
    if ticket.kind not in {"ssh", "tcp"}:
        raise TicketRefused(f"the ticket is for {ticket.kind!r}, which this door does not know")
    return ticket
