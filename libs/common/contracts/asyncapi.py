"""The AsyncAPI 3.0 document of the bus, made from the messages themselves: it cannot differ from the code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from libs.common.contracts.message import Kind, Message
from libs.common.contracts.messages import MESSAGES
from libs.common.contracts.subjects import SHARD, subject_for

SCHEMAS = "#/components/schemas/{model}"
KINDS = {
    Kind.EVENT: "An event: stored, delivered at least once.",
    Kind.COMMAND: "A command: stored in a work queue until its service has taken it.",
    Kind.REQUEST: "A request: answered once its effect is committed.",
    Kind.QUERY: "A query: answered, without an effect.",
    Kind.FRAME: "A piece of a log: stored for a day.",
}
PARAMETERS = {"team": "The team that the object belongs to.", "job": "The job.", "service": "The service asked."}
HEADERS: dict[str, str] = {
    "ce-id": "CloudEvents id, also the id by which receivers know a repeat.",
    "ce-type": "CloudEvents type, such as job.queued.v1.",
    "ce-source": "nabla/<service>.",
    "ce-time": "RFC 3339, UTC.",
    "ce-subject": "Id of the object.",
    "ce-team": "Id of its team.",
    "ce-project": "Id of its project.",
    "ce-revision": "The object's revision, from 1.",
    "ce-attempt": "The attempt that acts: the only fencing number.",
    "nabla-principal": "Who acts, as a Principal in JSON; in requests and queries.",
    "nabla-idempotency-key": "Of a request: repeated with the same key it takes effect once.",
    "nabla-request-hash": "Of what a client said under the key, where the message says it in other words.",
    "nabla-only-repeat": "Asks for the answer that was given under the key, and for nothing else.",
    "traceparent": "W3C trace context.",
}
REQUIRED = ["ce-id", "ce-type", "ce-source", "ce-time"]


class WireSchema(GenerateJsonSchema):
    """JSON Schema of proto3 JSON, where 64-bit integers are strings; readers take numbers too."""

    def int_schema(self, schema: core_schema.IntSchema) -> JsonSchemaValue:
        if "serialization" in schema:
            return {"type": ["string", "integer"], "format": "int64"}
        return super().int_schema(schema)


def asyncapi_document(version: str, messages: Sequence[type[Message]] = MESSAGES) -> dict[str, Any]:
    """The whole document; messages without a route appear as schemas only.

    Args:
        version: of the platform.
    """
    routed = [message for message in messages if hasattr(message, "ROUTE")]
    _, schemas = models_json_schema(
        [(message, "validation") for message in messages], ref_template=SCHEMAS, schema_generator=WireSchema
    )
    channels: dict[str, Any] = {}
    for message in routed:
        channels |= _channels(message)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Nabla on the bus",
            "version": version,
            "description": "CloudEvents 1.0 in NATS headers, proto3 JSON in the body. Generated from proto/.",
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": {message.ROUTE.name: _operation(message) for message in routed},
        "components": {
            "messages": {message.__name__: _message(message) for message in messages},
            "schemas": schemas["$defs"],
        },
    }


def _channels(message: type[Message]) -> dict[str, Any]:
    route = message.ROUTE
    channel = {
        "address": _address(message),
        "title": route.name,
        "description": KINDS[route.kind],
        "messages": {message.__name__: {"$ref": f"#/components/messages/{message.__name__}"}},
    }
    names = [name for name in PARAMETERS if f"{{{name}}}" in _address(message)]
    if names:
        channel["parameters"] = {name: {"description": PARAMETERS[name]} for name in names}
    if not route.reply:
        return {route.name: channel}
    reply = {
        "address": None,
        "title": f"answer to {route.name}",
        "messages": {route.reply: {"$ref": f"#/components/messages/{route.reply}"}},
    }
    return {route.name: channel, f"{route.name}.reply": reply}


def _address(message: type[Message]) -> str:
    service = "{service}" if message.ROUTE.owner == "each" else ""
    return subject_for(message, team="{team}", object_id="{job}", service=service)


def _operation(message: type[Message]) -> dict[str, Any]:
    route = message.ROUTE
    reference = f"#/channels/{route.name}"
    operation: dict[str, Any] = {
        "action": "send" if route.kind is Kind.EVENT else "receive",
        "channel": {"$ref": reference},
        "title": message.__name__,
        "messages": [{"$ref": f"{reference}/messages/{message.__name__}"}],
        "tags": [{"name": route.owner}, {"name": route.kind.name.lower()}],
        "bindings": {} if route.kind is Kind.EVENT else {"nats": {"queue": route.owner}},
    }
    if route.kind is Kind.COMMAND:
        operation["description"] = f"Shard {SHARD} of the work queue of {route.owner}."
    if route.reply:
        answer = f"{reference}.reply"
        operation["reply"] = {
            "channel": {"$ref": answer},
            "messages": [{"$ref": f"{answer}/messages/{route.reply}"}],
        }
    return operation


def _message(message: type[Message]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": message.__name__,
        "contentType": "application/json",
        "payload": {"$ref": f"#/components/schemas/{message.__name__}"},
    }
    if message.__doc__ and message.__doc__ != Message.__doc__:
        described["summary"] = message.__doc__.strip()
    if hasattr(message, "ROUTE"):
        described["headers"] = _headers(message.ROUTE.type)
    return described


def _headers(message_type: str) -> dict[str, Any]:
    properties: dict[str, Any] = {name: {"type": "string", "description": text} for name, text in HEADERS.items()}
    properties["ce-type"] = {"const": message_type}
    return {"type": "object", "required": REQUIRED, "properties": properties}
