"""Ports that are remembered, folders in /tmp that are ours, settings that say what is wrong with them."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local import console
from infra.local.control import service_environment
from infra.local.installation import (
    Installation,
    InstallationError,
    claim_ports,
    open_installation,
    private_folder,
    remembered_ports,
)
from infra.local.settings import LocalSettings
from nabla import installations
from tests.support.ports import free_port

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _ports_are_given_back(tmp_path: Path) -> Iterator[None]:
    """What a home remembers is its own for as long as it exists, and pytest keeps these for a while."""
    yield
    for file in tmp_path.rglob("ports.json"):
        file.unlink()


def claimed(home: Path, port: int) -> Installation:
    installation, _ = claim_ports(open_installation(LocalSettings(home=home, port=port)))
    return installation


def test_ports_are_remembered_for_as_long_as_nobody_wishes_another(tmp_path: Path) -> None:
    first = claimed(tmp_path, free_port())
    assert claimed(tmp_path, first.ports["front_door"]).ports == first.ports
    wished = free_port()
    assert claimed(tmp_path, wished).ports == first.ports | {"front_door": wished}


def test_a_port_that_had_to_move_is_kept_while_the_wish_is_the_same(tmp_path: Path) -> None:
    wished = free_port()
    neighbour = claimed(tmp_path / "one", wished)
    moved = claimed(tmp_path / "two", wished)
    assert neighbour.ports["front_door"] == wished
    assert not set(neighbour.ports.values()) & set(moved.ports.values())
    assert claimed(tmp_path / "two", wished).ports == moved.ports


def test_a_changed_wish_does_not_hide_where_a_running_installation_is(tmp_path: Path) -> None:
    running = claimed(tmp_path, free_port())
    assert open_installation(LocalSettings(home=tmp_path, port=free_port())).ports == running.ports


def test_a_client_on_this_machine_knows_the_installation_by_an_id_that_stays(tmp_path: Path) -> None:
    told = [service_environment(claimed(tmp_path / name, free_port())) for name in ("one", "one", "two")]
    one, again, two = (env["NABLA_INSTALLATION_ID"] for env in told)
    assert one == again != two
    assert installations.is_here(one)
    assert installations.is_here(two)
    assert not installations.is_here("another")


@pytest.mark.parametrize("text", ["", "{", "7", '{"front_door": 8080'])
def test_ports_that_cannot_be_read_are_chosen_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "ports.json").write_text(text)
    assert remembered_ports(tmp_path) == {}
    installation = claimed(tmp_path, free_port())
    assert json.loads((tmp_path / "ports.json").read_text()).items() >= installation.ports.items()


def test_a_link_that_somebody_put_in_place_of_our_folder_is_refused(tmp_path: Path) -> None:
    private_folder(tmp_path / "mine")
    private_folder(tmp_path / "mine")
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o700
    (tmp_path / "theirs").symlink_to(tmp_path / "mine")
    with pytest.raises(InstallationError, match="not a folder of yours"):
        private_folder(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("port = eight", "nabla.toml cannot be read"),
        ('port = "eight"', "port Input should be a valid integer"),
        ('isolation = "bwarp"', "isolation Input should be 'auto', 'bwrap' or 'process'"),
        ('host = "192.0.2.7"', "host is 127.0.0.1, or 0.0.0.0"),
        ('s3_endpoint = "https://s3.internal"', "s3_endpoint is host:port, without http://"),
        ('s3_endpoint = "s3.internal:9000"', "s3_endpoint needs s3_access_key and s3_secret_key"),
        ('ray_address = "ray://head:10001"', "ray_address is host:port"),
        ('database_url = "postgresql://nabla:geheim@db/nabla"', "database_url needs {service}"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_what_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    (tmp_path / "nabla.toml").write_text(text)
    monkeypatch.setenv("NABLA_HOME", str(tmp_path))
    assert console.main("down") == 1
    shown = capsys.readouterr().err
    assert told in shown
    assert "geheim" not in shown
    assert "Traceback" not in shown


def test_a_new_key_for_secrets_is_added_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NABLA_HOME", str(tmp_path))
    for _ in range(2):
        assert console.main("rotate-secrets-key") == 0
    file = tmp_path / "keys" / "secrets.keys"
    assert len(file.read_text().split()) == 3
    said = capsys.readouterr().out
    assert str(file) in said
    assert not any(line in said for line in file.read_text().split())
    file.chmod(0o644)
    assert console.main("rotate-secrets-key") == 1
    assert "chmod 600" in capsys.readouterr().err
