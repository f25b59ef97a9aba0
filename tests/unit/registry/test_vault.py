"""Encryption at rest: what does not open must not, and says so."""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from pathlib import Path

import pytest

from services.registry.adapters import vault as vaults
from services.registry.adapters.vault import FileVault, add_key
from services.registry.ports import BrokenSeal, Sealed, UnusableKeys

pytestmark = pytest.mark.unit
VALUE, BOUND = b"correct horse battery staple", b"project:pr1|NAME|1|sc1"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "secrets.keys"


def test_a_value_opens_where_it_was_sealed_also_for_the_next_process(keys: Path) -> None:
    sealed = FileVault(keys).seal(VALUE, BOUND)
    assert FileVault(keys).open(sealed, BOUND) == VALUE
    assert VALUE not in sealed.ciphertext
    assert keys.stat().st_mode & 0o777 == 0o600


def test_a_flipped_bit_anywhere_fails_loudly(keys: Path) -> None:
    vault = FileVault(keys)
    sealed = vault.seal(VALUE, BOUND)
    for name in ("ciphertext", "wrapped_key"):
        content = getattr(sealed, name)
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= 1
            with pytest.raises(BrokenSeal, match="changed or exchanged"):
                vault.open(replace(sealed, **{name: bytes(flipped)}), BOUND)


def test_a_row_in_the_place_of_another_fails_loudly(keys: Path) -> None:
    vault = FileVault(keys)
    sealed, other = vault.seal(VALUE, BOUND), vault.seal(VALUE, b"project:pr2|NAME|1|sc2")
    with pytest.raises(BrokenSeal):
        vault.open(other, BOUND)
    with pytest.raises(BrokenSeal):
        vault.open(replace(sealed, wrapped_key=other.wrapped_key), BOUND)
    with pytest.raises(BrokenSeal):
        vault.rewrap(other, BOUND)


def test_each_value_has_a_key_of_its_own_and_no_nonce_comes_twice(keys: Path) -> None:
    vault = FileVault(keys)
    many = [vault.seal(VALUE, BOUND) for _ in range(500)]
    nonces = {each.ciphertext[:12] for each in many} | {each.wrapped_key[:12] for each in many}
    assert len(nonces) == 2 * len(many)
    opened = {vault._unwrapped(each, BOUND) for each in many}
    assert len(opened) == len(many)


def test_after_a_turn_of_the_key_old_values_open_and_new_ones_are_under_the_new_key(keys: Path) -> None:
    vault = FileVault(keys)
    old = vault.seal(VALUE, BOUND)
    newest = add_key(keys)
    assert vault.keys() == (old.key_id, newest)
    assert vault.seal(VALUE, BOUND).key_id == newest
    assert vault.open(old, BOUND) == VALUE
    wrapped = vault.rewrap(old, BOUND)
    assert (wrapped.key_id, wrapped.ciphertext) == (newest, old.ciphertext)
    keys.write_text(keys.read_text().splitlines()[-1])
    assert FileVault(keys).open(wrapped, BOUND) == VALUE
    with pytest.raises(BrokenSeal, match=r"is not in secrets\.keys"):
        FileVault(keys).open(old, BOUND)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can do it for somebody else")
def test_a_key_that_root_makes_is_still_its_users(keys: Path) -> None:
    FileVault(keys)
    os.chown(keys, 61_001, 61_002)
    add_key(keys)
    found = keys.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (61_001, 61_002, 0o600)


def test_a_key_file_that_was_lost_and_made_anew_is_not_taken_for_the_old_one(keys: Path) -> None:
    sealed = FileVault(keys).seal(VALUE, BOUND)
    keys.unlink()
    with pytest.raises(BrokenSeal, match=sealed.key_id):
        FileVault(keys).open(sealed, BOUND)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (b"", 0o600, "restore it"),
        (b"c2hvcnQ=\n", 0o600, "restore it"),
        (b"!\n", 0o600, "restore it"),
        (base64.b64encode(b"k" * 32), 0o644, "chmod 600"),
    ],
)
def test_a_file_of_keys_that_is_open_or_spoiled_is_refused(keys: Path, content: bytes, mode: int, said: str) -> None:
    keys.parent.mkdir()
    keys.write_bytes(content)
    keys.chmod(mode)
    with pytest.raises(UnusableKeys, match=said):
        FileVault(keys)


def test_nothing_of_a_sealed_value_or_a_key_is_in_its_repr(keys: Path) -> None:
    assert repr(Sealed(ciphertext=b"abc", wrapped_key=b"def", key_id="k1")) == "Sealed(key_id='k1')"


def test_processes_that_start_at_once_agree_on_one_key(keys: Path) -> None:
    vaults.make_keys(keys)
    first = keys.read_bytes()
    vaults.make_keys(keys)
    assert keys.read_bytes() == first
    assert [path.name for path in keys.parent.iterdir()] == [keys.name], "no draft is left behind"
