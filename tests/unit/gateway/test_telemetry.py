"""One trace from the caller through us, and metrics without ids in their labels."""

from __future__ import annotations

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from libs.common.contracts.messages import GetProject, Project
from tests.unit.gateway.fakes import BEARER, World

pytestmark = pytest.mark.unit

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Kept(SpanExporter):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: object) -> SpanExportResult:
        self.spans += list(spans)  # type: ignore[call-overload]
        return SpanExportResult.SUCCESS


@pytest.fixture
def kept() -> Kept:
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    exporter = Kept()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


async def test_a_request_continues_its_callers_trace_under_the_routes_template(
    client: httpx.AsyncClient, world: World, kept: Kept
) -> None:
    world.owners.answers[GetProject] = lambda _: Project(id="pr1")
    headers = BEARER | {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    answer = await client.get("/api/v1/projects/digits", headers=headers)
    assert answer.headers["x-trace-id"] == TRACE
    assert answer.headers["traceparent"].startswith(f"00-{TRACE}-")
    mine = next(each for each in kept.spans if each.name == "GET /api/v1/projects/{project}")
    assert mine.context is not None
    assert format(mine.context.trace_id, "032x") == TRACE
    assert dict(mine.attributes or {})["http.response.status_code"] == 200


async def test_a_problem_names_the_trace_under_which_the_logs_speak_of_it(
    client: httpx.AsyncClient, kept: Kept
) -> None:
    answer = await client.get("/api/v1/nothing")
    assert answer.json()["trace_id"] == answer.headers["x-trace-id"]
    assert [each.name for each in kept.spans][-1] == "GET unmatched"


async def test_a_request_is_one_span_of_ours_and_none_of_the_frameworks(
    client: httpx.AsyncClient, world: World, kept: Kept
) -> None:
    world.owners.answers[GetProject] = lambda _: Project(id="pr1")
    await client.get("/api/v1/projects/digits", headers=BEARER)
    assert [each.name for each in kept.spans] == ["GET /api/v1/projects/{project}"]
