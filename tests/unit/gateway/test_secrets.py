"""Secrets over HTTP: what goes in is in no answer, no error and no log."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest

from libs.common.contracts.messages import (
    CheckSecrets,
    DeleteSecret,
    Experiment,
    GetProject,
    Job,
    JobTemplate,
    ListSecrets,
    Project,
    Secret,
    SecretPage,
    SetSecret,
    StartExperiment,
    SubmitJob,
)
from libs.common.errors import Invalid, NotFound
from libs.common.telemetry import JsonFormatter
from tests.unit.gateway.fakes import BEARER, World

pytestmark = pytest.mark.unit
CANARY = 'canary "value" é'
URL = "/api/v1/secrets/HF_TOKEN"


def refuse(_question: object) -> Any:
    raise Invalid("bad_value", "The value has a NUL character.")


@pytest.fixture
def world(world: World) -> World:
    world.owners.answers |= {
        GetProject: lambda asked: Project(id="pr1", name="digits", state="active"),
        SetSecret: lambda asked: Secret(id="sc1", name=asked.name, project_id=asked.project_id, version=1),
        DeleteSecret: lambda asked: Secret(id="sc1", name=asked.name),
        ListSecrets: lambda asked: SecretPage(items=(Secret(id="sc1", name="HF_TOKEN", version=3),)),
        CheckSecrets: lambda asked: SecretPage(),
        SubmitJob: lambda asked: Job(id="js1"),
        StartExperiment: lambda asked: Experiment(id="ex1"),
    }
    return world


async def test_a_secret_goes_to_its_owner_and_its_value_does_not_come_back(
    client: httpx.AsyncClient, world: World
) -> None:
    answer = await client.put(URL, json={"value": CANARY, "project_id": "digits"}, headers=BEARER)
    assert answer.status_code == 200
    assert answer.json()["name"] == "HF_TOKEN"
    assert "canary" not in answer.text
    [asked] = world.owners.of(SetSecret)
    assert (asked.name, asked.project_id, asked.value) == ("HF_TOKEN", "pr1", CANARY)
    assert "canary" not in repr(asked)
    assert [each.key for each in world.owners.asked if isinstance(each.message, SetSecret)] == [""]


async def test_lists_and_deletes_name_the_project(client: httpx.AsyncClient, world: World) -> None:
    listed = (await client.get("/api/v1/secrets?project_id=digits", headers=BEARER)).json()
    assert listed["items"][0]["version"] == 3
    assert "value" not in listed["items"][0]
    assert (await client.delete(f"{URL}?project_id=digits", headers=BEARER)).status_code == 200
    assert [world.owners.of(kind)[0].project_id for kind in (ListSecrets, DeleteSecret)] == ["pr1", "pr1"]


BAD_BODIES = [
    {"value": [CANARY]},
    {"value": {"a": CANARY}},
    {"value": CANARY, "project_id": ["digits"]},
    {"value": CANARY + "\0"},
    {"value": CANARY * 100_000},
    {"valeu": CANARY},
    {"value": CANARY, "extra": CANARY},
    [CANARY],
    CANARY,
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
async def test_what_is_wrong_with_a_body_is_said_without_repeating_it(
    client: httpx.AsyncClient, body: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = await client.put(URL, json=body, headers=BEARER)
    assert 400 <= answer.status_code < 500
    assert "canary" not in answer.text
    assert "canary" not in in_the_log(caplog)


@pytest.mark.parametrize("broken", ['{"value": "canary', '{"value": canary}', "canary"])
async def test_what_is_not_json_is_not_repeated_either(client: httpx.AsyncClient, broken: str) -> None:
    headers = BEARER | {"content-type": "application/json"}
    answer = await client.put(URL, content=broken, headers=headers)
    assert 400 <= answer.status_code < 500
    assert "canary" not in answer.text


@pytest.mark.parametrize("answer", [None, refuse, lambda asked: 1 / 0])
async def test_a_failure_on_the_way_logs_nothing_of_it(
    client: httpx.AsyncClient, world: World, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    if answer is None:
        del world.owners.answers[SetSecret]
    else:
        world.owners.answers[SetSecret] = answer
    told = await client.put(URL, json={"value": CANARY}, headers=BEARER)
    assert told.status_code >= 400
    assert "canary" not in told.text
    assert "canary" not in in_the_log(caplog)


def in_the_log(caplog: pytest.LogCaptureFixture) -> str:
    """As the services write it, errors with their traces."""
    return "\n".join(JsonFormatter("gateway").format(record) for record in caplog.records)


TEMPLATE = {
    "command": ["true"],
    "env": {"A": "secret:A", "PLAIN": "secret::B", "OTHER": "text"},
    "container": {"registry_password": "secret:REGISTRY"},
}


@pytest.mark.parametrize("path", ["/api/v1/jobs", "/api/v1/experiments"])
async def test_the_names_in_a_job_are_asked_for_before_it_is_submitted(
    client: httpx.AsyncClient, world: World, path: str
) -> None:
    answer = await client.post(path, json={"project_id": "digits", "template": TEMPLATE}, headers=BEARER)
    assert answer.status_code == 201
    [asked] = world.owners.of(CheckSecrets)
    assert (asked.project_id, asked.names) == ("pr1", ("A", "REGISTRY"))

    def none_there(_asked: CheckSecrets) -> SecretPage:
        raise NotFound("secret_not_found", "There is no secret A in this project or team.", "`nabla secrets set A`")

    world.owners.answers[CheckSecrets] = none_there
    refused = await client.post(path, json={"project_id": "digits", "template": TEMPLATE}, headers=BEARER)
    assert (refused.status_code, refused.json()["code"]) == (404, "secret_not_found")
    assert len(world.owners.of(SubmitJob) + world.owners.of(StartExperiment)) == 1


async def test_a_job_without_secrets_asks_nobody(client: httpx.AsyncClient, world: World) -> None:
    template = JobTemplate(command=("true",), env={"A": "b"}).model_dump(include={"command", "env"})
    body = json.loads(json.dumps({"project_id": "digits", "template": template}))
    assert (await client.post("/api/v1/jobs", json=body, headers=BEARER)).status_code == 201
    assert world.owners.of(CheckSecrets) == []
