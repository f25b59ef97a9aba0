"""Encryption of endpoint tokens at rest: AES-256-GCM, each bound to its deployment."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from libs.common.errors import NablaError

KEY_BYTES, NONCE_BYTES = 32, 12


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


def key_from(file: Path) -> bytes:
    """The key in the file; a new one, written once, when there is no file yet."""
    if not file.exists():
        _make_key(file)
    key = file.read_bytes()
    if len(key) != KEY_BYTES:
        raise NablaError(f"{file} holds {len(key)} bytes, and a key has {KEY_BYTES}: restore it from a backup")
    return key


def _make_key(file: Path) -> None:
    """Whole or not at all, and never over another: half a key would be taken for a lost one at every later start."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.") as draft:
        draft.write(secrets.token_bytes(KEY_BYTES))
        draft.flush()
        os.fsync(draft.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft.name, file)
