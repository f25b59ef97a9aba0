"""Installers are told what the node's own settings say, and reach what these name."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.executor.adapters.environments.package_index import index_of, parse_settings
from services.executor.adapters.networks.reach import Place

pytestmark = pytest.mark.unit

HOSTS = ".default-hosts='index.example files.example'\n"


def test_the_strongest_setting_counts_and_those_of_other_commands_do_not() -> None:
    text = "global.index-url='https://a/simple'\ndownload.index-url='https://b'\n:env:.index-url='https://c/simple'\n"
    assert parse_settings(text + "nonsense\nglobal.broken=[\n")["index-url"] == "https://c/simple"


def test_without_settings_the_installers_own_index_is_open() -> None:
    found = index_of(parse_settings(HOSTS), {})
    assert found.places == (Place("files.example", 443, True), Place("index.example", 443, True))
    assert "PIP_INDEX_URL" not in found.env
    assert found.env["PIP_CONFIG_FILE"] == "/dev/null"


def test_settings_name_the_places_and_files_that_are_open(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    settings = parse_settings(
        f"{HOSTS}global.index-url='http://mirror:8080/simple'\n"
        f"global.extra-index-url='https://more/simple file://{tmp_path}/index/simple'\n"
        f"global.find-links='{wheels}'\nglobal.proxy='http://user:word@proxy:1'\n"
    )
    found = index_of(settings, {"UV_INDEX": "name=https://uv.example/simple", "SECRET": "x"}, ("cdn:444",))
    assert {(place.host, place.port) for place in found.places} == {
        ("mirror", 8080),
        ("more", 443),
        ("uv.example", 443),
        ("cdn", 444),
    }
    assert set(found.files) == {wheels, tmp_path / "index"}
    assert found.env["PIP_INDEX_URL"] == found.env["UV_DEFAULT_INDEX"] == "http://mirror:8080/simple"
    assert "word" not in str(found.env)
    assert "SECRET" not in found.env
