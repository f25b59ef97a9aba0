"""The Python messages against proto/: the same JSON, in both directions, as Google's own implementation speaks."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from libs.common.contracts.message import Kind, Message
from libs.common.contracts.messages import MESSAGES

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[2]
BUF = Path(sys.executable).parent / "buf"
ROUTED = tuple(message for message in MESSAGES if hasattr(message, "ROUTE"))


@pytest.fixture(scope="module")
def pool() -> descriptor_pool.DescriptorPool:
    command = [str(BUF), "build", "-o", "-", "--as-file-descriptor-set"]
    image = subprocess.run(command, cwd=ROOT / "proto", check=True, capture_output=True).stdout
    pool = descriptor_pool.DescriptorPool()
    for file in FileDescriptorSet.FromString(image).file:
        pool.Add(file)
    return pool


def proto_class(pool: descriptor_pool.DescriptorPool, message: type[Message]) -> Any:
    aggregates = {path.parent.name for path in (ROOT / "proto/nabla").glob("*/v1")}
    for aggregate in sorted(aggregates):
        try:
            found = pool.FindMessageTypeByName(f"nabla.{aggregate}.v1.{message.__name__}")
        except KeyError:
            continue
        return message_factory.GetMessageClass(found)
    raise AssertionError(f"{message.__name__} is in no proto file")


def filled(message: type[Message], depth: int = 0) -> Message:
    """An instance in which no field has its default, so that none can be forgotten."""
    return message(**{name: value_for(field.annotation, depth) for name, field in message.model_fields.items()})


def value_for(annotation: Any, depth: int) -> Any:
    if get_origin(annotation) is tuple:
        return (value_for(get_args(annotation)[0], depth),)
    if get_origin(annotation) is dict:
        return {"key": value_for(get_args(annotation)[1], depth)}
    choices = [part for part in get_args(annotation) if part is not type(None)]
    if choices and type(None) in get_args(annotation):
        return value_for(choices[0], depth)
    if isinstance(annotation, type) and issubclass(annotation, Message):
        return filled(annotation, depth + 1) if depth < 6 else annotation()
    examples = {
        str: "text",
        bytes: b"\x00\xffz",
        bool: True,
        float: 1.5,
        int: 7,
        datetime: datetime(2026, 1, 2, 3, 4, 5, 600_000, UTC),
    }
    return examples[annotation]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_a_message_is_the_same_json_in_both_implementations(
    message: type[Message], pool: descriptor_pool.DescriptorPool
) -> None:
    ours = filled(message)
    theirs = json_format.Parse(ours.to_wire(), proto_class(pool, message)())
    printed = json_format.MessageToJson(theirs, preserving_proto_field_name=True)
    assert message.from_wire(printed.encode()) == ours
    assert set(json.loads(printed)) == set(message.model_fields)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_a_message_ignores_fields_it_does_not_know(message: type[Message]) -> None:
    assert message.from_wire(b'{"a_field_of_tomorrow": {"x": [1]}}') == message()


def test_64_bit_integers_are_strings_on_the_wire_and_numbers_in_rest() -> None:
    from libs.common.contracts.messages import Resources

    resources = Resources(memory_bytes=2**53 + 1)
    assert json.loads(resources.to_wire())["memory_bytes"] == str(2**53 + 1)
    assert json.loads(resources.model_dump_json())["memory_bytes"] == 2**53 + 1


def test_the_generated_file_is_what_proto_says() -> None:
    command = [sys.executable, str(ROOT / "infra/generate_contracts.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("message", ROUTED, ids=lambda message: message.ROUTE.type)
def test_names_follow_the_rule_of_their_kind(message: type[Message]) -> None:
    route = message.ROUTE
    aggregate, _, verb = route.name.partition(".")
    assert aggregate
    assert verb
    assert bool(route.reply) == (route.kind in (Kind.REQUEST, Kind.QUERY))
    assert not route.reply or route.reply in {each.__name__ for each in MESSAGES}
    if route.kind is Kind.EVENT:
        assert verb.split("_")[0].endswith(("ed", "ing", "out", "reachable", "ready")), f"{verb} is no participle"
