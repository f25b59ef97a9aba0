"""What travels: envelopes, bodies and problems, there and back, and what is said of garbled ones."""

from __future__ import annotations

import contextlib
import string
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from libs.common import errors
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import CreateProject, LogFrame, Point, Principal, Project, SubmitJob
from libs.common.contracts.problem import Problem, problem_of, refusal_from
from libs.common.errors import IllegalTransition, MalformedMessage, NablaError, Refusal, StaleRevision, Unauthenticated

pytestmark = pytest.mark.unit

WORDS = st.text(string.ascii_letters + string.digits + ".-_", min_size=1, max_size=30)
MAYBE = st.just("") | WORDS
PRINCIPALS = st.builds(
    Principal,
    kind=st.sampled_from(["user", "attempt", "service"]),
    id=WORDS,
    name=st.text(max_size=30),
    team_id=MAYBE,
    role=MAYBE,
    scopes=st.lists(WORDS, max_size=3).map(tuple),
    project_id=MAYBE,
    job_id=MAYBE,
    attempt=st.integers(0, 2**31 - 1),
)
ENVELOPES = st.builds(
    Envelope,
    id=WORDS,
    type=WORDS,
    source=WORDS,
    time=st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    object_id=MAYBE,
    team_id=MAYBE,
    project_id=MAYBE,
    revision=st.integers(0, 2**62),
    attempt=st.integers(0, 2**31 - 1),
    idempotency_key=MAYBE,
    traceparent=MAYBE,
    sender=st.none() | PRINCIPALS,
)
GOOD = Envelope("ev1", "job.queued.v1", "scheduler", datetime(2026, 1, 2, tzinfo=UTC), revision=3, attempt=1).headers()


@given(ENVELOPES)
def test_an_envelope_comes_back_as_it_was(envelope: Envelope) -> None:
    assert Envelope.parse(envelope.headers()) == envelope


@given(ENVELOPES)
def test_headers_are_single_lines(envelope: Envelope) -> None:
    for value in envelope.headers().values():
        assert not set(value) & {"\r", "\n", "\0"}


def test_facts_never_travel() -> None:
    known = {each.name for each in fields(Envelope)}
    assert "facts" in known
    told = Envelope("ev1", "t", "s", datetime.now(UTC), facts="SECRET")
    assert "SECRET" not in str(told.headers())
    assert Envelope.parse(told.headers()).facts is None


def test_the_time_of_another_zone_is_the_same_moment() -> None:
    there = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=5)))
    parsed = Envelope.parse(Envelope("ev1", "t", "s", there).headers())
    assert parsed.time == there


def test_who_is_not_named_is_not_authenticated() -> None:
    with pytest.raises(Unauthenticated):
        _ = Envelope.parse(GOOD).principal


@pytest.mark.parametrize("name", ["ce-id", "ce-type", "ce-source", "ce-time"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_header_is_named(name: str, value: str | None) -> None:
    headers = {key: text for key, text in GOOD.items() if key != name}
    if value is not None:
        headers[name] = value
    with pytest.raises(MalformedMessage) as caught:
        Envelope.parse(headers)
    assert caught.value.fields == (name,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ce-time", "SECRET"),
        ("ce-time", "2026-01-01T00:00:00"),
        ("ce-revision", "SECRET"),
        ("ce-revision", ""),
        ("ce-attempt", "1.5"),
        ("nabla-principal", "SECRET"),
        ("nabla-principal", '{"scopes": "SECRET"}'),
    ],
)
def test_a_garbled_header_is_malformed_and_its_content_is_not_told(name: str, value: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        Envelope.parse(GOOD | {name: value})
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None


@given(st.dictionaries(st.sampled_from([*GOOD, "nabla-principal", "ce-subject"]), st.text(max_size=20)))
def test_any_headers_are_an_envelope_or_malformed(headers: dict[str, str]) -> None:
    with contextlib.suppress(MalformedMessage):
        Envelope.parse(GOOD | headers)


@given(st.binary(max_size=60))
def test_any_body_is_a_message_or_malformed(body: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        CreateProject.from_wire(body)


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (b'{"name": {"SECRET": "SECRET"}}', ("name",)),
        (b'{"name": ["SECRET"], "description": 5}', ("description", "name")),
        (b"SECRET", ("body",)),
        (b'"SECRET"', ("body",)),
        (b"[]", ("body",)),
        (b"\xff\xfe", ("body",)),
    ],
)
def test_a_wrong_body_names_its_fields_and_never_their_content(body: bytes, wrong: tuple[str, ...]) -> None:
    with pytest.raises(MalformedMessage) as caught:
        CreateProject.from_wire(body)
    assert caught.value.fields == wrong
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_place_of_a_nested_field_is_told() -> None:
    with pytest.raises(MalformedMessage) as caught:
        SubmitJob.from_wire(b'{"template": {"resources": {"cpu_count": "SECRET"}}}')
    assert caught.value.fields == ("template.resources.cpu_count",)


def test_an_empty_body_is_a_message_of_defaults_and_unknown_fields_are_left_out() -> None:
    assert CreateProject.from_wire(b"") == CreateProject()
    assert CreateProject.from_wire(b'{"name": "a", "of_tomorrow": 1}') == CreateProject(name="a")


@given(st.integers(-(2**63), 2**63 - 1))
def test_large_numbers_travel_as_proto_writes_them_and_come_back(number: int) -> None:
    project = Project(id="pr1", revision=number)
    assert f'"{number}"'.encode() in project.to_wire()
    assert Project.from_wire(project.to_wire()) == project
    assert project.model_dump()["revision"] == number


@given(st.text(max_size=50), st.floats(allow_nan=False))
def test_text_and_numbers_come_back_exactly(name: str, value: float) -> None:
    point = Point(name=name, value=value)
    if not any(0xD800 <= ord(letter) < 0xE000 for letter in name):
        assert Point.from_wire(point.to_wire()) == point


def test_messages_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        LogFrame(job_id="js1").job_id = "js2"  # type: ignore[misc]


REFUSALS = sorted(set(errors.REFUSALS.values()), key=lambda kind: kind.status)


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_crosses_the_bus_and_is_the_same(kind: type[Refusal]) -> None:
    before = kind("the_code", "What and why.", "Do this.", project_id="pr1", limit=3, share=0.5)
    on_the_wire = problem_of(before).model_dump_json()
    after = refusal_from(Problem.model_validate_json(on_the_wire))
    assert type(after) is kind
    assert vars(after) == vars(before)
    assert str(after) == "What and why."


def _tree(kind: type[NablaError]) -> set[type[NablaError]]:
    return {kind}.union(*(_tree(each) for each in kind.__subclasses__()))


def test_every_status_has_one_class_and_every_class_a_way_back() -> None:
    assert len({kind.status for kind in REFUSALS}) == len(REFUSALS)
    for kind in _tree(Refusal):
        if kind.__module__ != errors.__name__:
            # A service's own, which its own front answers with.
            continue
        assert issubclass(kind, errors.REFUSALS[kind.status])


def test_a_full_disk_arrives_as_unavailable_with_its_remedy() -> None:
    problem = problem_of(errors.DiskFull("/srv/nabla"))
    assert (problem.status, problem.code) == (503, "disk_full")
    assert "Free space at /srv/nabla" in problem.remedy
    assert type(refusal_from(problem)) is errors.Unavailable


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (MalformedMessage("CreateProject", ("name",)), 422, "malformed"),
        (IllegalTransition("job", "js1", "queued", "finish"), 409, "wrong_state"),
        (StaleRevision("jobs", "js1", 3), 500, "internal"),
        (OperationalError("SECRET", {"password": "SECRET"}, Exception("SECRET")), 500, "internal"),
        (KeyError("SECRET"), 500, "internal"),
    ],
)
def test_other_errors_have_a_problem_without_their_insides(error: Exception, status: int, code: str) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.code) == (status, code)
    assert "SECRET" not in problem.model_dump_json()
    assert isinstance(refusal_from(problem), Refusal)
