"""The files of traces: bounded, readable after a kill at any byte, and read together with the older one."""

from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

from infra.show_trace import read_spans
from libs.common.telemetry import TraceFile

pytestmark = pytest.mark.unit

MOST = 20_000


def spans(*names: str) -> list[ReadableSpan]:
    tracer = TracerProvider().get_tracer("test")
    made = []
    for name in names:
        with tracer.start_as_current_span(name) as span:
            pass
        assert isinstance(span, ReadableSpan)
        made.append(span)
    return made


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "traces").mkdir()
    return tmp_path


def path_in(home: Path) -> Path:
    return home / "traces" / "registry.jsonl"


def names_in(home: Path) -> list[str]:
    return [span.name for span in read_spans(home)]


def test_a_full_file_makes_room_and_one_older_is_kept_and_read(home: Path) -> None:
    file = TraceFile(path_in(home), MOST)
    written = [f"s{number}" for number in range(200)]
    for name in written:
        file.export(spans(name))
    file.shutdown()
    files = sorted(path_in(home).parent.iterdir())
    assert [each.name for each in files] == ["registry.1.jsonl", "registry.jsonl"]
    assert all(each.stat().st_size < MOST + 2000 for each in files)
    assert files[0].stat().st_size >= MOST
    found = names_in(home)
    assert found == written[-len(found) :]
    assert len(found) < len(written)


def test_a_line_that_a_kill_cut_short_spoils_no_other(home: Path) -> None:
    first = TraceFile(path_in(home), MOST)
    first.export(spans("a", "b"))
    first.shutdown()
    whole = path_in(home).read_bytes()
    for end in range(whole.index(b"\n") + 1, len(whole)):
        path_in(home).write_bytes(whole[:end])
        again = TraceFile(path_in(home), MOST)
        again.export(spans("c"))
        again.export(spans("d"))
        again.shutdown()
        found = names_in(home)
        assert found in (["a", "c", "d"], ["a", "b", "c", "d"])


def test_a_kill_between_the_steps_of_turning_loses_nothing(home: Path) -> None:
    file = TraceFile(path_in(home), MOST)
    file.export(spans("before"))
    path_in(home).replace(path_in(home).with_suffix(".1.jsonl"))
    after = TraceFile(path_in(home), MOST)
    after.export(spans("after"))
    assert names_in(home) == ["before", "after"]
    file.shutdown()
    after.shutdown()


def test_two_writers_of_one_file_turn_it_once(home: Path) -> None:
    one, two = TraceFile(path_in(home), 1), TraceFile(path_in(home), 1)
    one.export(spans("a"))
    one.export(spans("b"))
    two.export(spans("c"))
    assert names_in(home) == ["a", "b", "c"]
    one.shutdown()
    two.shutdown()
