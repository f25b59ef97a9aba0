from __future__ import annotations

import pytest

from nabla.client import Client
from nabla.errors import (
    ApiError,
    BadConfig,
    Conflict,
    Forbidden,
    Invalid,
    NablaError,
    NoServer,
    NotFound,
    Unauthenticated,
    Unavailable,
    Unreachable,
)

from .stub import Reply, Seen, StubServer

pytestmark = pytest.mark.unit

PROJECT = {"id": "pj1", "name": "digits", "state": "active", "revision": 3, "unknown_member": 1}


def test_a_post_is_repeated_under_the_same_idempotency_key(stub: StubServer, client: Client) -> None:
    unavailable = Reply(503, {"title": "Starting", "status": 503})
    stub.on("POST", "/projects", unavailable, Reply(502), Reply(cut=True), Reply(201, PROJECT))
    assert client.projects.create("digits").id == "pj1"
    keys = [seen.headers["idempotency-key"] for seen in stub.calls("POST", "/projects")]
    assert len(keys) == 4
    assert len(set(keys)) == 1


def test_two_posts_have_two_keys(stub: StubServer, client: Client) -> None:
    stub.on("POST", "/projects", Reply(201, PROJECT))
    client.projects.create("a")
    client.projects.create("a")
    first, second = (seen.headers["idempotency-key"] for seen in stub.calls("POST", "/projects"))
    assert first != second


def test_patch_and_delete_carry_a_key_and_get_does_not(stub: StubServer, client: Client) -> None:
    for method in ("GET", "PATCH", "DELETE"):
        stub.on(method, "/projects/digits", Reply(200, PROJECT))
    client.projects.get("digits")
    client.projects.update("digits", description="")
    client.projects.delete("digits")
    assert ["idempotency-key" in seen.headers for seen in stub.seen] == [False, True, True]
    assert stub.seen[1].json == {"description": ""}
    assert all(seen.headers["authorization"] == "Bearer secret-token" for seen in stub.seen)


def test_retry_after_is_honoured(stub: StubServer) -> None:
    waits: list[float] = []
    stub.on("GET", "/whoami", Reply(503, {"title": "Busy"}, {"Retry-After": "7"}), Reply(200, {"id": "us1"}))
    with Client(stub.url, "t", sleep=waits.append) as client:
        assert client.whoami().id == "us1"
    assert waits == [7.0]


def test_waits_double_up_to_five_seconds(stub: StubServer) -> None:
    waits: list[float] = []
    stub.on("GET", "/whoami", *[Reply(503) for _ in range(7)], Reply(200, {}))
    with Client(stub.url, "t", sleep=waits.append) as client:
        client.whoami()
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_patience_ends(stub: StubServer) -> None:
    stub.on("GET", "/whoami", Reply(503, {"title": "Registry is down", "remedy": "Wait."}))
    with Client(stub.url, "t", patience_s=0.0) as client, pytest.raises(Unavailable, match="Registry is down"):
        client.whoami()
    assert len(stub.seen) == 1


def test_which_installation_it_is_is_asked_until_there_is_an_answer(stub: StubServer, client: Client) -> None:
    stub.on("GET", "/health", Reply(503), Reply(cut=True), Reply(200, {"installation_id": "0a1b"}))
    assert client.installation_id() == "0a1b"


def test_a_server_that_is_not_there_is_unreachable() -> None:
    with Client("http://127.0.0.1:9", "t", patience_s=0.0) as client, pytest.raises(Unreachable) as caught:
        client.whoami()
    assert "nabla up" in caught.value.remedy


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, Invalid), (401, Unauthenticated), (403, Forbidden), (404, NotFound), (409, Conflict), (413, Invalid),
     (422, Invalid), (418, ApiError), (500, ApiError)],
)  # fmt: skip
def test_a_problem_becomes_the_fitting_error(
    stub: StubServer, client: Client, status: int, kind: type[ApiError]
) -> None:
    problem = {"title": "No", "detail": "because", "remedy": "do", "code": "c", "trace_id": "t1", "project_id": "pj9"}
    stub.on("GET", "/whoami", Reply(status, problem))
    with pytest.raises(ApiError) as caught:
        client.whoami()
    error = caught.value
    assert type(error) is kind
    assert (str(error), error.remedy, error.code, error.trace_id) == ("No: because", "do", "c", "t1")
    assert error.extra == {"project_id": "pj9"}
    assert len(stub.seen) == 1


def test_an_error_without_a_problem_document_still_has_a_title(stub: StubServer, client: Client) -> None:
    stub.on("GET", "/whoami", Reply(404, "no object"))
    with pytest.raises(NotFound, match="HTTP 404"):
        client.whoami()


def test_an_answer_that_is_not_a_list_is_an_error_of_ours(stub: StubServer, client: Client) -> None:
    stub.on("GET", "/projects", Reply(200, {"hello": 1}))
    with pytest.raises(NablaError, match="not a list"):
        list(client.projects.list())


def test_lists_go_on_page_by_page_and_stop_at_the_limit(stub: StubServer, client: Client) -> None:
    def page(seen: Seen) -> Reply:
        start = int(seen.query.get("cursor", "0"))
        items = [{"id": f"pj{n}"} for n in range(start, start + int(seen.query["limit"]))]
        return Reply(200, {"items": items, "next_cursor": str(start + len(items))})

    stub.on("GET", "/projects", page)
    assert [p.id for p in client.projects.list(limit=201)][-1] == "pj200"
    assert [seen.query["limit"] for seen in stub.seen] == ["200", "1"]


def test_ensure_takes_the_project_that_is_there(stub: StubServer, client: Client) -> None:
    stub.on("POST", "/projects", Reply(409, {"title": "Taken", "code": "project_exists", "project_id": "pj1"}))
    stub.on("GET", "/projects/pj1", Reply(200, PROJECT))
    project, made = client.projects.ensure("digits")
    assert (project.id, made) == ("pj1", False)


def test_names_are_one_segment_of_the_path(stub: StubServer, client: Client) -> None:
    with pytest.raises(NotFound):
        client.models.get("a/../b c")
    assert stub.seen[0].path == "/api/v1/models/a%2F..%2Fb%20c"


def test_url_and_token_go_together() -> None:
    with pytest.raises(NoServer, match="together"):
        Client(url="http://127.0.0.1:1")


def test_a_prediction_goes_to_the_endpoint_with_its_own_token(stub: StubServer, client: Client) -> None:
    deployment = {"id": "dp1", "name": "digits", "state": "ready", "path": "/s3d/digits", "endpoint_token": "ep"}
    stub.on("GET", "/deployments/digits", Reply(200, deployment))
    stub.on("POST", "/s3d/digits/predict", Reply(200, {"predictions": [5]}))
    assert client.predict("digits", [[1, 2]]) == {"predictions": [5]}
    assert stub.seen[-1].headers["authorization"] == "Bearer ep"
    assert stub.seen[-1].json == {"inputs": [[1, 2]]}


@pytest.mark.parametrize("url", ["http://host:port", "http://[::1", "http://host:99999", "ftp://host", "host"])
def test_an_address_that_is_none_is_said_at_once(url: str) -> None:
    with pytest.raises(BadConfig, match="not an http or https address") as caught:
        Client(url, "t")
    assert "http://HOST:PORT" in caught.value.remedy


def test_the_line_end_of_a_token_file_is_not_part_of_the_token(stub: StubServer) -> None:
    stub.on("GET", "/whoami", Reply(200, {"id": "us1"}))
    with Client(stub.url, "secret-token\r\n") as client:
        client.whoami()
    assert stub.seen[0].headers["authorization"] == "Bearer secret-token"


@pytest.mark.parametrize("token", ["s3cret\nX-Evil: 1", "s3cr\u00e9t", "s3cret s3cret"])
def test_a_token_that_cannot_be_one_is_refused_without_showing_it(stub: StubServer, token: str) -> None:
    with pytest.raises(BadConfig) as caught:
        Client(stub.url, token)
    assert "s3cr" not in f"{caught.value} {caught.value.remedy}"


@pytest.mark.parametrize("status", [301, 403, 404, 500])
def test_an_answer_of_something_in_between_says_so(stub: StubServer, client: Client, status: int) -> None:
    stub.on("GET", "/whoami", Reply(status, "<html>", {"Location": "https://elsewhere/"}))
    with pytest.raises(ApiError, match=f"HTTP {status}.*https://elsewhere/") as caught:
        client.whoami()
    assert "proxy" in caught.value.remedy


def test_a_page_in_place_of_a_stream_is_no_stream(stub: StubServer, client: Client) -> None:
    stub.on("GET", "/jobs/js1/logs/stream", Reply(200, "<html>"))
    with pytest.raises(NablaError, match="not a stream"):
        list(client.jobs.watch("js1"))
