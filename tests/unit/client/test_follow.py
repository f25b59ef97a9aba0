from __future__ import annotations

import pytest

from nabla.client import Client
from nabla.errors import NotFound
from nabla.objects import Job, LogLine
from nabla.resources import jobs
from nabla.sse import EventParser

from .stub import Reply, StubServer, line, sse

pytestmark = pytest.mark.unit

END = sse("end", {"id": "js1", "state": "succeeded", "exit_code": 0})
STREAM = "/jobs/js1/logs/stream"


def test_events_are_whole_however_the_bytes_are_cut() -> None:
    text = 'id: 1\r\nevent: line\r\ndata: {"text": "Grüße\u2028"}\r\n\r\n: alive\n\ndata: a\ndata: b\n\n'.encode()
    for size in range(1, len(text)):
        parser = EventParser()
        events = [event for start in range(0, len(text), size) for event in parser.feed(text[start : start + size])]
        assert [(e.event, e.id) for e in events] == [("line", "1"), ("message", "1")]
        assert events[0].data == '{"text": "Grüße\u2028"}'
        assert events[1].data == "a\nb"


def test_an_event_that_was_cut_off_is_neither_given_nor_resumed_from() -> None:
    parser = EventParser()
    assert [event.data for event in parser.feed(b"id: 1\ndata: a\n\nid: 2\ndata: b\n")] == ["a"]
    assert parser.last_id == "1"


def test_a_broken_stream_resumes_without_losing_or_doubling_a_line(stub: StubServer, client: Client) -> None:
    stub.on(
        "GET",
        STREAM,
        Reply(chunks=[line(1, "a"), line(2, "b"), line(3, "c")[:20]]),
        Reply(cut=True),
        Reply(503, {"title": "Restarting"}),
        Reply(chunks=[line(2, "b"), line(3, "c"), line(4, "d"), END]),
    )
    assert [(one.sequence, one.text) for one in client.jobs.follow("js1")] == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]
    assert [seen.headers.get("last-event-id") for seen in stub.seen] == [None, "2", "2", "2"]
    assert [seen.query["after"] for seen in stub.seen] == ["0", "2", "2", "2"]


def test_a_thousand_lines_through_many_breaks_arrive_once_and_in_order(stub: StubServer, client: Client) -> None:
    lines = [line(n, f"line {n}") for n in range(1, 1001)]
    cuts = [Reply(chunks=[*lines[max(0, n - 10) : n + 50], lines[min(n + 50, 999)][:7]]) for n in range(0, 1000, 50)]
    stub.on("GET", STREAM, *cuts, Reply(chunks=[*lines[900:], END]))
    assert [one.sequence for one in client.jobs.follow("js1")] == list(range(1, 1001))


def test_the_last_event_is_the_ended_job(stub: StubServer, client: Client) -> None:
    stub.on("GET", STREAM, Reply(chunks=[sse("state", {"id": "js1", "state": "running"}), line(1, "a"), END]))
    events = list(client.jobs.watch("js1"))
    assert [type(event) for event in events] == [Job, LogLine, Job]
    assert isinstance(events[-1], Job)
    assert events[-1].ended


def test_following_an_unknown_job_fails_at_once(stub: StubServer, client: Client) -> None:
    with pytest.raises(NotFound):
        list(client.jobs.follow("js1"))
    assert len(stub.seen) == 1


def test_log_pages_are_read_to_the_end(stub: StubServer, client: Client) -> None:
    pages = [
        {"lines": [{"sequence": n, "text": str(n)} for n in part], "last_sequence": 5, "complete": True}
        for part in ((1, 2, 3), (4, 5))
    ]
    stub.on("GET", "/jobs/js1/logs", *[Reply(200, page) for page in pages])
    assert [one.sequence for one in client.jobs.logs("js1")] == [1, 2, 3, 4, 5]
    assert [seen.query["after"] for seen in stub.seen] == ["0", "3"]


def test_a_job_may_be_silent_for_longer_than_a_server_may(
    stub: StubServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RECONNECT_S", 0.0)  # over at once, counted from the first failure
    stub.on("GET", STREAM, Reply(chunks=[b": alive\n\n"]), Reply(chunks=[line(1, "a"), END]))
    assert [one.text for one in client.jobs.follow("js1")] == ["a"]


def test_a_front_door_that_starts_again_is_waited_for(stub: StubServer, client: Client) -> None:
    starting = (Reply(404, "no page"), Reply(500, {}))
    stub.on("GET", STREAM, Reply(chunks=[line(1, "a")]), *starting, Reply(chunks=[line(2, "b"), END]))
    assert [one.text for one in client.jobs.follow("js1")] == ["a", "b"]


def test_an_address_without_a_front_door_is_not_waited_for(stub: StubServer, client: Client) -> None:
    stub.on("GET", STREAM, Reply(404, "no page"))
    with pytest.raises(NotFound):
        list(client.jobs.follow("js1"))
