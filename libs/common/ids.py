"""Ids: a lower-case type prefix and a base32 UUIDv7, sortable by time, safe in subjects, hosts and paths."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets

import uuid_utils

PREFIXES = {
    "user": "u",
    "team": "t",
    "token": "tk",
    "sign_in": "si",
    "project": "pr",
    "experiment": "ex",
    "job": "js",
    "attempt": "at",
    "fileset": "fs",
    "model": "mo",
    "model_version": "mv",
    "deployment": "de",
    "event": "ev",
    "audit": "au",
    "secret": "sc",
}
# RFC 4648's extended hex alphabet keeps the order of the bytes, so ids sort by their time.
_TAIL = re.compile(r"[0-9a-v]{26}")


def new_id(kind: str) -> str:
    """A new id such as `js06a1c0...`; `kind` is a key of PREFIXES."""
    return PREFIXES[kind] + base64.b32hexencode(uuid_utils.uuid7().bytes).decode().rstrip("=").lower()


def is_id(kind: str, text: str) -> bool:
    """Whether `text` has the form of an id of this kind."""
    prefix = PREFIXES[kind]
    return text.startswith(prefix) and _TAIL.fullmatch(text, len(prefix)) is not None


def new_secret(prefix: str) -> str:
    """256 random bits behind a prefix that secret scanners can find."""
    return f"{prefix}_{secrets.token_urlsafe(32)}"


def secret_hash(secret: str) -> str:
    """What is stored and sent instead of a secret: hex SHA-256, enough because secrets are 256 random bits."""
    return hashlib.sha256(secret.encode()).hexdigest()
