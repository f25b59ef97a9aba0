"""How secrets cross the bus: sealed by HPKE (RFC 9180) for a key that the asking side made for one question.

All node agents are one user of the bus and could hear each other's answers, and whatever keeps messages for debugging
keeps these too.
"""

from __future__ import annotations

import base64

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from libs.common.errors import Invalid, NablaError


class NotForUs(NablaError):
    """Sealed for another key or another name, or changed on its way."""


class Writer:
    """The answering side.

    Args:
        public_key: the reader's, as it came.

    Raises:
        Invalid: it is none.
    """

    def __init__(self, public_key: str) -> None:
        try:
            self._key = X25519PublicKey.from_public_bytes(base64.b64decode(public_key, validate=True))
        except ValueError:
            raise Invalid("bad_key", "public_key is not an X25519 key in base64.", "Make a fresh one.") from None

    def seal(self, name: str, value: bytes) -> str:
        return base64.b64encode(_suite().encrypt(value, self._key, _info(name))).decode()


class Reader:
    """The asking side of one question. The key lives as long as this object."""

    def __init__(self) -> None:
        self._key = X25519PrivateKey.generate()

    @property
    def public_key(self) -> str:
        return base64.b64encode(self._key.public_key().public_bytes_raw()).decode()

    def open(self, name: str, sealed: str) -> str:
        """The value.

        Raises:
            NotForUs.
        """
        try:
            opened = _suite().decrypt(base64.b64decode(sealed), self._key, _info(name))
            return bytes(opened).decode()
        except (InvalidTag, ValueError):
            raise NotForUs(f"the secret {name} came in a form that cannot be opened") from None


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _info(name: str) -> bytes:
    return b"nabla-secret|" + name.encode()
