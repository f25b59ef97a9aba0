"""The API and the bus, described."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from libs.common.contracts.asyncapi import asyncapi_document
from libs.common.contracts.message import Kind
from libs.common.contracts.messages import MESSAGES, Job
from libs.common.contracts.subjects import filter_for

pytestmark = pytest.mark.unit

ROUTED = [message for message in MESSAGES if hasattr(message, "ROUTE")]


def references(part: Any) -> set[str]:
    return set(re.findall(r'"\$ref": "(#[^"]+)"', json.dumps(part)))


def resolve(document: Any, reference: str) -> Any:
    for name in reference.removeprefix("#/").split("/"):
        document = document[name]
    return document


@pytest.fixture(scope="module")
def bus() -> dict[str, Any]:
    return asyncapi_document("1.2.3")


async def test_openapi_describes_every_route_with_a_summary_a_tag_and_its_problems(client: httpx.AsyncClient) -> None:
    document = (await client.get("/api/v1/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    operations = [each for path in document["paths"].values() for each in path.values()]
    assert len(operations) > 40
    assert all(each["summary"] and each["tags"] for each in operations)
    assert len({each["operationId"] for each in operations}) == len(operations)
    problems = [each for each in operations if "4XX" in each["responses"]]
    assert len(problems) == len(operations) - 2
    for reference in references(document):
        assert resolve(document, reference)


async def test_openapi_answers_are_the_messages_of_the_contract(client: httpx.AsyncClient) -> None:
    document = (await client.get("/api/v1/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert set(schemas["Job"]["properties"]) == set(Job.model_fields)
    assert schemas["Job"]["properties"]["revision"]["type"] == "integer"
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


async def test_the_documentation_needs_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    page = await client.get("/api/docs")
    assert page.status_code == 200
    assert "/api/v1/jobs/{job_id}/logs/stream" in page.text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page.text)


async def test_the_bus_document_is_served(client: httpx.AsyncClient) -> None:
    assert (await client.get("/api/v1/asyncapi.json")).json()["asyncapi"] == "3.0.0"


def test_every_message_with_a_route_has_a_channel_an_operation_and_its_subject(bus: dict[str, Any]) -> None:
    assert set(bus["operations"]) == {message.ROUTE.name for message in ROUTED}
    for message in ROUTED:
        channel = bus["channels"][message.ROUTE.name]
        assert message.__name__ in channel["messages"]
        wild = re.sub(r"\{(team|job)\}", "*", channel["address"]).replace("{service}", "each")
        assert wild == filter_for(message)


def test_every_question_names_its_answer(bus: dict[str, Any]) -> None:
    for message in ROUTED:
        if message.ROUTE.kind in (Kind.REQUEST, Kind.QUERY):
            reply = bus["operations"][message.ROUTE.name]["reply"]
            assert resolve(bus, reply["messages"][0]["$ref"])


def test_every_reference_of_the_bus_document_leads_somewhere(bus: dict[str, Any]) -> None:
    for reference in references(bus):
        assert resolve(bus, reference)


def test_bodies_on_the_bus_match_their_schemas(bus: dict[str, Any]) -> None:
    for message in MESSAGES:
        schema = {"$ref": f"#/components/schemas/{message.__name__}", "components": bus["components"]}
        Draft202012Validator(schema).validate(json.loads(message().to_wire()))
