"""Secrets that come out the same when a request is repeated, though nothing of them is stored.

`POST /tokens` repeated with the same Idempotency-Key must answer the same token. The owner keeps only its hash, so
the gateway makes it from a key of its own and the request's key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
from pathlib import Path

KEY_BYTES = 32


class SecretMaker:
    def __init__(self, key: bytes) -> None:
        self._key = key

    def make(self, prefix: str, *purpose: str) -> str:
        """256 bits behind a prefix; the same for the same purpose, and nothing without the key."""
        text = "\0".join((prefix, *purpose)).encode()
        digest = hmac.new(self._key, text, hashlib.sha256).digest()
        return f"{prefix}_{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def load_key(path: Path) -> bytes:
    """The gateway's key, made at the first start in a file that only its user can read."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_suffix(f".{os.getpid()}.new")
    if not path.exists():
        with os.fdopen(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        try:
            # A link never replaces: of two processes that start at once, one key wins.
            os.link(fresh, path)
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    return path.read_bytes()
