"""Values of secrets in what a job prints: hidden in every form and however the output is cut."""

from __future__ import annotations

import base64
import itertools
import json
import random
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.executor.adapters.attempts.masking import MOST_FORMS, PIECE, Masker

pytestmark = pytest.mark.unit
VALUE = 'p@ss wörd/"1\\2"&3'


def through(masker: Masker, text: bytes, cuts: list[int]) -> bytes:
    """The stream's output for an input that comes in these pieces."""
    stream = masker.stream()
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown = [stream.feed(text[start:end]) for start, end in itertools.pairwise(places)]
    return b"".join(shown) + stream.end()


FORMS = {
    "plain": VALUE,
    "json": json.dumps(VALUE)[1:-1],
    "json in utf-8": json.dumps(VALUE, ensure_ascii=False)[1:-1],
    "percent": quote(VALUE, safe=""),
    "form": quote_plus(VALUE),
    "base64": base64.b64encode(VALUE.encode()).decode(),
    "base64url": base64.urlsafe_b64encode(VALUE.encode()).decode(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(cuts=st.lists(st.integers(0, 120), max_size=6))
def test_no_form_of_a_value_is_shown_however_it_is_cut(form: str, cuts: list[int]) -> None:
    shown = through(Masker([VALUE]), f"before {form} after\nnext: {form}".encode(), cuts).decode()
    assert form.rstrip("=") not in shown
    assert shown.startswith("before ***")
    assert "after\nnext: ***" in shown


@pytest.mark.parametrize("before", ["", "a", "ab", "user:", "x" * 50])
@pytest.mark.parametrize("after", ["", "\n", "@host", "zz"])
def test_a_value_within_a_base64_text_is_hidden_wherever_it_begins(before: str, after: str) -> None:
    text = base64.b64encode(f"{before}{VALUE}{after}".encode())
    shown = Masker([VALUE]).whole(text)
    assert b"***" in shown
    known = len(text) - len(shown) + 3
    assert known >= len(VALUE.encode()) * 8 // 6 - 1, "all that the value alone decides"


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=8))
def test_what_holds_no_value_comes_out_as_it_went_in(text: bytes, cuts: list[int]) -> None:
    masker = Masker(["correct horse", "battery staple"])
    assert through(masker, text, cuts) == text
    assert through(Masker([]), text, cuts) == text


@given(
    st.lists(st.sampled_from(["correct horse", "correct ", "horse", "\n", "battery", "x"]), max_size=12),
    st.lists(st.integers(0, 150), max_size=8),
)
def test_the_cuts_make_no_difference(words: list[str], cuts: list[int]) -> None:
    masker = Masker(["correct horse", "horse battery"])
    text = "".join(words).encode()
    assert b"correct horse" not in through(masker, text, cuts)
    assert through(masker, text, cuts) == through(masker, text, list(range(len(text))))


def test_of_two_values_that_begin_alike_the_longer_is_hidden_whole() -> None:
    masker = Masker(["abcdef", "abcdefghij"])
    assert through(masker, b"abcdefghij abcdef", [6, 12]) == b"*** ***"


def test_a_line_that_is_whole_is_shown_at_once_and_its_beginning_of_a_value_waits() -> None:
    stream = Masker(["correct horse"]).stream()
    assert stream.feed(b"to be correct\n") == b"to be correct\n"
    assert stream.feed(b"password: corr") == b"password: "
    assert stream.feed(b"ect!") == b"correct!"
    assert stream.feed(b"cor") == b""
    assert stream.end() == b"cor"


def test_each_line_of_a_value_is_hidden_by_itself() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0BAQEF\n-----END KEY-----\n"
    masker = Masker([key])
    shown = masker.text(f"read:\n{key}second line: kqhkiG9w0BAQEF")
    assert "kqhkiG" not in shown
    assert "MIIEvQ" not in shown
    assert "kqhkiG" not in masker.text(json.dumps({"key": key}))
    wrapped = base64.encodebytes((key * 3).encode()).decode()
    assert Masker([key * 3]).text(wrapped).replace("***", "").strip() == ""


def test_short_values_are_no_secrets() -> None:
    assert Masker(["true", "12345", ""]).text("true 12345") == "true 12345"
    assert Masker(["123456"]).text("123456") == "***"


def test_what_is_looked_for_and_held_back_is_bounded_even_for_the_longest_values() -> None:
    values = [random.Random(number).randbytes(32_000).hex() for number in range(4)]
    masker = Masker(values)
    assert len(masker._forms) <= MOST_FORMS
    assert masker.text(f"<{values[3]}>").replace("***", "") == "<>"
    stream = masker.stream()
    text = values[3].encode()
    held = 0
    for start in range(0, len(text), 3000):
        stream.feed(text[start : start + 3000])
        held = max(held, len(stream._held))
    assert held <= 2 * PIECE
