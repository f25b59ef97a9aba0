"""Encryption of endpoint tokens at rest: AES-256-GCM, each bound to its deployment."""

from __future__ import annotations

import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from libs.common.errors import NablaError
from libs.common.keyfiles import key_from

NONCE_BYTES = 12


class BrokenSeal(NablaError):
    """A sealed secret that is not of its owner, was changed, or was sealed with another key."""

    def __init__(self, owner_id: str) -> None:
        super().__init__(f"the sealed token of {owner_id} cannot be opened with this installation's key")


class FileKeyVault:
    """Seals with a key from a file of mode 0600, which is made when it is not there."""

    def __init__(self, key_file: Path) -> None:
        self._cipher = AESGCM(key_from(key_file))

    def seal(self, secret: str, owner_id: str) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, secret.encode(), owner_id.encode())

    def open(self, sealed: bytes, owner_id: str) -> str:
        """The secret.

        Raises:
            BrokenSeal.
        """
        try:
            opened = self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], owner_id.encode())
        except InvalidTag:
            raise BrokenSeal(owner_id) from None
        return opened.decode()
