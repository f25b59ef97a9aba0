"""Which program is started as which server, and with whose credentials."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infra.local.installation import open_installation
from infra.local.servers import BIN, OLDEST, ServerMissingError, find_program, ray_environment
from infra.local.settings import LocalSettings

pytestmark = pytest.mark.unit

NAME = "nats-server"
WHEEL = str(BIN / NAME)


def program(folder: Path, script: str, name: str = NAME) -> str:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all there is on PATH, but for what scripts need."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    return tmp_path / "path"


def test_the_settings_come_before_the_path(tmp_path: Path, on_path: Path) -> None:
    program(on_path, "echo nats-server: v3.0.0")
    mine = program(tmp_path / "mine", "echo nats-server: v2.99.1")
    assert find_program(NAME, mine) == mine


def test_the_path_comes_before_the_wheel(on_path: Path) -> None:
    theirs = program(on_path, "echo nats-server: v2.12.6")
    assert find_program(NAME, "") == theirs


def test_the_wheel_is_taken_when_nothing_else_is_there(on_path: Path) -> None:
    assert find_program(NAME, "") == WHEEL


@pytest.mark.parametrize("script", ["echo nats-server: v2.12.5", "echo hello", "exit 127"])
def test_a_program_on_the_path_that_is_too_old_or_none_is_gone_around(on_path: Path, script: str) -> None:
    program(on_path, script)
    assert find_program(NAME, "") == WHEEL


def test_a_program_for_another_machine_on_the_path_is_gone_around(on_path: Path) -> None:
    Path(program(on_path, "")).write_bytes(b"\x7fELF for something else")
    assert find_program(NAME, "") == WHEEL


def test_a_program_of_the_settings_that_is_too_old_is_refused_and_not_replaced(tmp_path: Path) -> None:
    old = program(tmp_path / "mine", "echo nats-server: v1.4.0")
    with pytest.raises(
        ServerMissingError, match=re.escape(f"The version of {old} is 1.4.0; Nabla needs nats-server 2")
    ):
        find_program(NAME, old)


def test_a_program_of_the_settings_that_does_not_start_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("v9.9.9")
    with pytest.raises(ServerMissingError, match="is unknown"):
        find_program(NAME, str(file))


def test_a_program_that_is_nowhere_is_named_with_what_to_do(tmp_path: Path) -> None:
    for name, configured in ((NAME, str(tmp_path / "nowhere")), ("no-such-server", "")):
        with pytest.raises(ServerMissingError, match=r"make up.*nabla\.toml"):
            find_program(name, configured)


@pytest.mark.parametrize("name", sorted(OLDEST))
def test_each_wheel_has_a_server_that_is_new_enough(name: str) -> None:
    assert find_program(name, str(BIN / name)) == str(BIN / name)


def test_our_own_ray_gets_our_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    env = ray_environment(open_installation(LocalSettings(home=tmp_path)))
    assert env["RAY_AUTH_MODE"] == "token"
    assert Path(env["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600


def test_a_ray_cluster_of_others_gets_the_token_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installation = open_installation(LocalSettings(home=tmp_path, ray_address="head:6379"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert not [name for name in ray_environment(installation) if name.startswith("RAY_AUTH")]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/etc/ray/token")
    env = ray_environment(installation)
    assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN_PATH"]) == ("token", "/etc/ray/token")
    assert not (installation.keys / "ray-token").exists()
