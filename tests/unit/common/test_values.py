"""The small values that everything is made of: ids, times, cursors and transition tables."""

from __future__ import annotations

import contextlib
import string
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.clock import from_us, to_us, utc_now
from libs.common.errors import IllegalTransition, Invalid
from libs.common.ids import PREFIXES, is_id, new_id, new_secret, secret_hash
from libs.common.pages import DEFAULT_LIMIT, MAX_LIMIT, decode_cursor, encode_cursor, page_limit
from libs.common.transitions import TransitionTable

pytestmark = pytest.mark.unit

# Hypothesis takes bounds without a zone and adds it.
MOMENTS = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


def test_ids_sort_in_the_order_in_which_they_were_made() -> None:
    made = [new_id("job") for _ in range(2000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)


def test_a_later_millisecond_sorts_later_whatever_the_random_part() -> None:
    for _ in range(20):
        earlier = new_id("event")
        time.sleep(0.002)
        assert earlier < new_id("event")


@pytest.mark.parametrize("kind", PREFIXES)
def test_an_id_is_of_its_own_kind_and_of_no_other(kind: str) -> None:
    made = new_id(kind)
    assert [each for each in PREFIXES if is_id(each, made)] == [kind]
    assert set(made) <= set(string.ascii_lowercase + string.digits)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "js",
        "js" + "0" * 25,
        "js" + "0" * 27,
        "js" + "W" * 26,
        "js" + "w" * 26,
        "js" + "é" * 26,
        "js" + "²" * 26,
        "js" + "0" * 25 + "\n",
        "js" + "0" * 26 + "\n",
        "xjs" + "0" * 26,
        "JS" + "0" * 26,
        "js" + "0" * 25 + "/",
    ],
)
def test_what_only_looks_like_an_id_is_none(text: str) -> None:
    assert not is_id("job", text)


@given(st.text(max_size=40))
def test_what_is_taken_for_an_id_is_safe_in_subjects_hosts_and_paths(text: str) -> None:
    if is_id("job", "js" + text):
        assert set(text) <= set(string.ascii_lowercase + string.digits)


def test_secrets_differ_and_their_hash_is_what_is_kept() -> None:
    first, second = new_secret("nbl"), new_secret("nbl")
    assert first != second
    assert first.startswith("nbl_")
    assert len(secret_hash(first)) == 64
    assert secret_hash(first) == secret_hash(first) != secret_hash(second)


@given(MOMENTS)
def test_a_stored_time_is_exact_to_the_microsecond(moment: datetime) -> None:
    assert from_us(to_us(moment)) == moment


@given(st.integers(-(10**15), 7 * 10**15))
def test_stored_microseconds_come_back_as_they_were(microseconds: int) -> None:
    assert to_us(from_us(microseconds)) == microseconds


@given(MOMENTS, st.timedeltas(timedelta(microseconds=1), timedelta(days=9000)))
def test_a_later_time_is_a_greater_number(moment: datetime, later: timedelta) -> None:
    assert to_us(moment + later) - to_us(moment) == later // timedelta(microseconds=1)


def test_the_present_knows_its_zone() -> None:
    assert utc_now().tzinfo is UTC


@pytest.mark.parametrize(("asked", "given_"), [(0, DEFAULT_LIMIT), (-3, DEFAULT_LIMIT), (1, 1), (10**9, MAX_LIMIT)])
def test_a_page_has_a_sensible_length(asked: int, given_: int) -> None:
    assert page_limit(asked) == given_


@given(st.text(max_size=60, alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_a_cursor_comes_back_as_the_id_it_was(last_id: str) -> None:
    cursor = encode_cursor(last_id)
    assert decode_cursor(cursor) == last_id
    assert set(cursor) <= set(string.ascii_letters + string.digits + "_-")


@given(st.text(max_size=40))
def test_a_cursor_that_nobody_gave_is_refused_and_never_another_page(cursor: str) -> None:
    with contextlib.suppress(Invalid):
        assert encode_cursor(decode_cursor(cursor)) == cursor


@pytest.mark.parametrize("cursor", ["!!!!", "a*b", "é", "=", "_w", "abcde", "AA", "YQBi"])
def test_garbled_cursors_are_refused(cursor: str) -> None:
    with pytest.raises(Invalid) as caught:
        decode_cursor(cursor)
    assert caught.value.code == "bad_cursor"


LAMP = TransitionTable(
    "lamp",
    {("off", "press"): "on", ("on", "release"): "off", ("on", "break"): "broken", ("off", "break"): "broken"},
    frozenset({"broken"}),
)


def test_the_table_knows_all_states() -> None:
    assert LAMP.states == {"off", "on", "broken"}


@pytest.mark.parametrize(
    ("state", "trigger", "after"),
    [
        ("off", "press", "on"),
        ("on", "press", "on"),
        ("on", "release", "off"),
        ("off", "release", "off"),
        ("on", "break", "broken"),
        ("off", "break", "broken"),
        *(("broken", trigger, "broken") for trigger in ("press", "release", "break", "unheard of")),
    ],
)
def test_each_state_and_trigger_has_its_outcome_and_a_repeat_changes_nothing(
    state: str, trigger: str, after: str
) -> None:
    assert LAMP.next_state("l1", state, trigger) == after
    assert LAMP.next_state("l1", after, trigger) == after


@pytest.mark.parametrize("state", ["off", "on"])
def test_an_illegal_move_names_the_state_and_the_trigger(state: str) -> None:
    with pytest.raises(IllegalTransition, match=f"lamp l1 is {state}: melt") as caught:
        LAMP.next_state("l1", state, "melt")
    assert (caught.value.state, caught.value.trigger) == (state, "melt")
