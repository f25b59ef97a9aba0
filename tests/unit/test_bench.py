"""What `make bench` prints."""

from __future__ import annotations

from tests.bench.__main__ import committed, promises, table


def row(measured: str, holds: bool = True) -> dict[str, object]:
    return {"promise": "p50 at most 1/20", "measured": measured, "holds": holds}


def test_each_promise_stands_beside_what_was_committed_of_it() -> None:
    lines = table([row("1/14", holds=False)], [row("1/21")])
    assert lines[-1].split() == ["MISSED", "p50", "at", "most", "1/20", "1/14", "1/21"]


def test_a_promise_that_is_new_has_nothing_beside_it() -> None:
    assert table([row("1/21")], [])[-1].split()[-2:] == ["1/21", "-"]


def test_the_committed_results_are_found() -> None:
    assert len({row["promise"] for row in promises(committed())}) > 5
