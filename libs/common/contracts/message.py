"""The base of all messages and the route each one carries."""

from __future__ import annotations

import base64
import enum
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, SerializationInfo, ValidationError

from libs.common.errors import MalformedMessage

VERSION = "v1"
WIRE = {"wire": True}


def _int64(value: int, info: SerializationInfo) -> int | str:
    return str(value) if info.context == WIRE else value


# proto3 JSON writes 64-bit integers as strings; REST and Python want numbers.
Int64 = Annotated[int, PlainSerializer(_int64, return_type=Any)]


def _bytes_of(value: object) -> object:
    return base64.b64decode(value, validate=True) if isinstance(value, str) else value


def _base64_of(value: bytes) -> str:
    return base64.b64encode(value).decode()


# proto3 JSON writes bytes in base64.
Bytes = Annotated[bytes, BeforeValidator(_bytes_of), PlainSerializer(_base64_of, return_type=str, when_used="json")]


class Kind(enum.Enum):
    """The four kinds of message and the log frame; see proto/nabla/options/v1."""

    EVENT = "evt"
    COMMAND = "cmd"
    REQUEST = "req"
    QUERY = "qry"
    FRAME = "log"


@dataclass(frozen=True, slots=True)
class Route:
    """How a message travels: what it is, whose it is, and its name `<aggregate>.<verb>`."""

    kind: Kind
    owner: str
    name: str
    reply: str = ""

    @property
    def type(self) -> str:
        """The CloudEvents type, such as `job.queued.v1`."""
        return f"{self.name}.{VERSION}"

    @property
    def aggregate(self) -> str:
        return self.name.split(".")[0]


class Message(BaseModel):
    """A frozen message whose JSON is proto3 JSON; unknown fields are ignored, as a newer sender may add some."""

    # Infinity and NaN as proto3 JSON writes them; a null would make the whole body malformed.
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True, ser_json_inf_nan="strings")
    ROUTE: ClassVar[Route]

    def to_wire(self) -> bytes:
        return self.model_dump_json(context=WIRE).encode()

    @classmethod
    def from_wire(cls, body: bytes) -> Self:
        """Decodes a body.

        Raises:
            MalformedMessage: naming the wrong fields, never their content, which may be secret.
        """
        try:
            return cls.model_validate_json(body or b"{}")
        except ValidationError as error:
            fields = sorted({".".join(str(part) for part in item["loc"]) or "body" for item in error.errors()})
            raise MalformedMessage(cls.__name__, tuple(fields)) from None
