"""Keys of the installation: 32 random bytes in a file of mode 0600, made when they are first needed."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from libs.common.errors import NablaError

KEY_BYTES = 32


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
