"""What a process is told and what it tells: settings and log lines."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.ids import new_secret
from libs.common.settings import Settings
from libs.common.telemetry import JsonFormatter, current_traceparent, redact, span

pytestmark = pytest.mark.unit

SEED = "SUAIBDPBAUTWCWBKIO6XHQNINK5FWJW4OHLXC3HQ2KFE4PEJUA44CNHTC4"
SECRETS = {
    "token": (f"token {(user := new_secret('nbl'))} was used", user),
    "attempt token": (f"NABLA_TOKEN={(job := new_secret('nbla'))}", job),
    "bearer": ("Authorization: Bearer abc.def-_~+/==", "abc.def"),
    "bearer in small letters": ("authorization: bearer QUJDREVG", "QUJDREVG"),
    "database": ("postgresql+asyncpg://nabla:hunter2hunter2@db:5432/x failed", "hunter2hunter2"),
    "no user": ("redis://:hunter2hunter2@db", "hunter2hunter2"),
    "presigned": ("GET /b/k?X-Amz-Date=1&X-Amz-Signature=0123456789abcdef&x=1", "0123456789abcdef"),
    "seed": (f"signing in with {SEED} failed", SEED[2:]),
}


@pytest.mark.parametrize("case", SECRETS)
def test_a_secret_is_blanked_and_what_is_around_it_stays(case: str) -> None:
    text, secret = SECRETS[case]
    before, _, after = text.partition(secret)
    told = redact(text)
    assert secret not in told
    assert told.startswith(before[:8])
    assert "***" in told
    assert told.endswith(after.lstrip("-_~+/=. ").split(" ")[-1])
    assert redact(told) == told


@pytest.mark.parametrize(
    "text",
    ["http://127.0.0.1:8080/api", "nbl_short", "a bearer of news", "SUMMARY", "user@host", "", "nabla_job_0123456789"],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text).replace("***", "of") == text


def _line(message: str, **extra: object) -> str:
    record = logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": message, **extra})
    return JsonFormatter("registry").format(record)


@given(st.text(max_size=80), st.sampled_from([text for text, _ in SECRETS.values()]), st.text(max_size=20))
def test_a_log_line_is_json_on_one_line_whatever_is_blanked_in_it(before: str, secret: str, after: str) -> None:
    line = _line(before + secret + '" ' + after, job_id=secret)
    assert "\n" not in line
    assert json.loads(line)["service"] == "registry"
    for _, hidden in SECRETS.values():
        assert hidden not in line


def test_a_log_line_has_the_extra_fields_the_trace_and_the_error() -> None:
    try:
        raise ValueError("Bearer abcdefgh")
    except ValueError:
        line = json.loads(_line("failed", job_id="js1", exc_info=sys.exc_info()))
    assert (line["message"], line["job_id"], line["level"]) == ("failed", "js1", "info")
    assert line["error"].endswith("ValueError: Bearer ***")


def test_a_span_continues_the_trace_it_is_given() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with span("work", parent):
        assert current_traceparent().startswith("00-0af7651916cd43dd8448eb211c80319c-")
    assert current_traceparent() == ""


class Own(Settings):
    limit: int = 1


def test_the_environment_wins_over_the_file_and_the_file_over_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "nabla.toml"
    file.write_text('limit = 2\nfront_door = "http://file"\nlog_level = "DEBUG"\nof_another_service = 1\n')
    assert Own().limit == 1
    monkeypatch.setenv("NABLA_SETTINGS", str(file))
    assert (Own().limit, Own().front_door, Own().log_level) == (2, "http://file", "DEBUG")
    monkeypatch.setenv("NABLA_LIMIT", "3")
    monkeypatch.setenv("NABLA_FRONT_DOOR", "http://environment")
    assert (Own().limit, Own().front_door, Own().log_level) == (3, "http://environment", "DEBUG")
    assert Own(limit=4).limit == 4


def test_settings_are_frozen_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="frozen"):
        Own().limit = 5  # type: ignore[misc]
    monkeypatch.setenv("NABLA_LIMIT", "many")
    with pytest.raises(ValueError, match="limit"):
        Own()


def test_the_database_is_a_file_of_the_installation_unless_there_is_a_url(tmp_path: Path) -> None:
    assert Settings(home=tmp_path).database_for("registry") == f"sqlite:///{tmp_path}/data/registry.db"
    assert (tmp_path / "data").stat().st_mode & 0o077 == 0
    elsewhere = Settings(database_url="postgresql://u@h/{service}")
    assert elsewhere.database_for("registry") == "postgresql://u@h/registry"


def test_a_seed_is_read_from_the_keys_of_its_service(tmp_path: Path) -> None:
    folder = tmp_path / "keys" / "nats"
    folder.mkdir(parents=True)
    (folder / "registry.nk").write_text(f"{SEED}\n")
    assert Settings(home=tmp_path).nats_seed("registry") == SEED
    assert Settings(nats_keys=folder).nats_seed("registry") == SEED
