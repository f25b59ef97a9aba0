"""Requests carry a trace: the environment's, one per command, or each its own."""

from __future__ import annotations

import pytest

from nabla.client import Client

from .stub import Reply, StubServer

pytestmark = pytest.mark.unit

GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def traces(stub: StubServer) -> list[str]:
    return [seen.headers["traceparent"].split("-")[1] for seen in stub.seen]


def test_each_request_of_a_program_is_a_trace_of_its_own(stub: StubServer, client: Client) -> None:
    stub.on("GET", "/whoami", Reply(200, {}))
    client.whoami()
    client.whoami()
    assert len(set(traces(stub))) == 2


def test_all_requests_of_one_command_are_one_trace(stub: StubServer) -> None:
    stub.on("GET", "/whoami", Reply(200, {}))
    with Client(stub.url, "t", traceparent=GIVEN) as client:
        client.whoami()
        client.whoami()
    assert {seen.headers["traceparent"] for seen in stub.seen} == {GIVEN}


@pytest.mark.parametrize(("variable", "goes_on"), [(GIVEN, True), ("", False), ("00-0-0-01", False), ("x", False)])
def test_a_trace_in_the_environment_goes_on(
    stub: StubServer, client: Client, monkeypatch: pytest.MonkeyPatch, variable: str, goes_on: bool
) -> None:
    monkeypatch.setenv("TRACEPARENT", variable)
    stub.on("GET", "/whoami", Reply(200, {}))
    client.whoami()
    assert (stub.seen[0].headers["traceparent"] == GIVEN) is goes_on
