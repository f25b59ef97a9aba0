"""Secrets at rest: AES-256-GCM, a fresh key for each value, wrapped by the installation's key from a file.

The file (mode 0600) has one key a line, in base64, the newest last: that one wraps, the others still open what they
have wrapped. A key's id is made from the key, so a file that was lost and made anew is never taken for the old one.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.registry.ports import BrokenSeal, Sealed, UnusableKeys

KEY_BYTES, NONCE_BYTES = 32, 12


class FileVault:
    """Seals with keys from a file, which is made when it is not there and read again whenever it has changed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read_as: tuple[int, ...] = ()
        self._keys: dict[str, bytes] = {}
        make_keys(file)
        self._load()

    def seal(self, value: bytes, bound_to: bytes) -> Sealed:
        key = secrets.token_bytes(KEY_BYTES)
        return self._wrapped(_encrypt(key, value, bound_to), key, bound_to)

    def open(self, sealed: Sealed, bound_to: bytes) -> bytes:
        return self._decrypt(self._unwrapped(sealed, bound_to), sealed.ciphertext, bound_to)

    def rewrap(self, sealed: Sealed, bound_to: bytes) -> Sealed:
        return self._wrapped(sealed.ciphertext, self._unwrapped(sealed, bound_to), bound_to)

    def keys(self) -> Sequence[str]:
        self._load()
        return tuple(self._keys)

    def _wrapped(self, ciphertext: bytes, key: bytes, bound_to: bytes) -> Sealed:
        newest = self.keys()[-1]
        wrapped = _encrypt(self._keys[newest], key, _wrapping(newest, bound_to))
        return Sealed(ciphertext=ciphertext, wrapped_key=wrapped, key_id=newest)

    def _unwrapped(self, sealed: Sealed, bound_to: bytes) -> bytes:
        if sealed.key_id not in self.keys():
            detail = f"The key {sealed.key_id} that a secret is sealed with is not in {self._file.name}."
            raise BrokenSeal("secret_key_missing", detail, "Put it back from a backup, or set the secret anew.")
        return self._decrypt(self._keys[sealed.key_id], sealed.wrapped_key, _wrapping(sealed.key_id, bound_to))

    def _decrypt(self, key: bytes, sealed: bytes, bound_to: bytes) -> bytes:
        try:
            return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], bound_to)
        except InvalidTag:
            detail = "A secret in the database is not what was put there: its row was changed or exchanged."
            raise BrokenSeal("secret_broken", detail, "Set it anew, and find out who has changed it.") from None

    def _load(self) -> None:
        """Cheap when nothing has changed; somebody may have added a key meanwhile."""
        status = self._file.stat()
        read_as = (status.st_mtime_ns, status.st_size, status.st_ino)
        if read_as != self._read_as:
            self._keys = {key_id(key): key for key in read_keys(self._file)}
            self._read_as = read_as


def add_key(file: Path) -> str:
    """Makes a new newest key; its id. The registry wraps everything with it soon after."""
    make_keys(file)
    key = secrets.token_bytes(KEY_BYTES)
    turn = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        draft, own = _draft(file, [*read_keys(file), key]), file.stat()
        # Root may do this for the registry's user, who must still be able to read it.
        os.chown(draft, own.st_uid, own.st_gid)
        draft.replace(file)
        os.fsync(turn)
    finally:
        os.close(turn)
    return key_id(key)


def make_keys(file: Path) -> None:
    """Whole or not at all, and never over another: half a key would be taken for a lost one at every later start."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = _draft(file, [secrets.token_bytes(KEY_BYTES)])
    try:
        with contextlib.suppress(FileExistsError):
            os.link(draft, file)
    finally:
        draft.unlink()


def read_keys(file: Path) -> list[bytes]:
    """The keys of the file.

    Raises:
        UnusableKeys: others can read it, or it does not hold keys.
    """
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise UnusableKeys(f"{file} holds the keys of all secrets, and others may read it: `chmod 600 {file}`")
    try:
        keys = [base64.b64decode(line, validate=True) for line in file.read_text().split()]
    except ValueError:
        keys = []
    if not keys or any(len(key) != KEY_BYTES for key in keys):
        raise UnusableKeys(f"{file} does not hold keys of {KEY_BYTES} bytes in base64: restore it from a backup")
    return keys


def key_id(key: bytes) -> str:
    return hashlib.sha256(b"nabla-key|" + key).hexdigest()[:16]


def _encrypt(key: bytes, value: bytes, bound_to: bytes) -> bytes:
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, value, bound_to)


def _wrapping(key: str, bound_to: bytes) -> bytes:
    return b"key|" + key.encode() + b"|" + bound_to


def _draft(file: Path, keys: Sequence[bytes]) -> Path:
    draft = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
        out.write(b"".join(base64.b64encode(key) + b"\n" for key in keys))
        out.flush()
        os.fsync(out.fileno())
    return draft
