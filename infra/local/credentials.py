"""Random credentials, made once at the first start, in files that only their owner can read."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

import nkeys

from libs.common.ids import new_secret


def secret_file(path: Path, make: str) -> str:
    """The secret in `path`, written with mode 0600 when there is none yet."""
    if path.exists():
        return path.read_text().strip()
    write_private(path, make + "\n")
    return make


def write_private(path: Path, text: str) -> None:
    """Writes a file of mode 0600 whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)


def nats_public_key(folder: Path, user: str) -> str:
    """The public nkey of a NATS user; its seed is in `<folder>/<user>.nk`."""
    seed = secret_file(folder / f"{user}.nk", _new_seed())
    public: bytes = nkeys.from_seed(seed.encode()).public_key
    return public.decode()


def _new_seed() -> str:
    seed: bytes = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode()


def api_token(keys: Path) -> str:
    return secret_file(keys / "api-token", new_secret("nbl"))


def ray_token(keys: Path) -> str:
    return secret_file(keys / "ray-token", secrets.token_hex(32))


def s3_keys(keys: Path) -> tuple[str, str]:
    """Access key and secret key of the platform's one S3 identity."""
    made = json.dumps({"access_key": secrets.token_hex(10), "secret_key": secrets.token_hex(24)})
    pair = json.loads(secret_file(keys / "s3.json", made))
    return str(pair["access_key"]), str(pair["secret_key"])
