"""Request bodies: strict where messages are lenient.

Between services unknown fields are ignored, as a newer sender may add some. From a client they are refused: a
misspelt field would otherwise be lost without a word, and a field that is not offered must not be settable.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

INT64 = range(-(2**63), 2**63)


class Body(BaseModel):
    """Refuses unknown fields at every depth, and values that a database or a proto cannot hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_strays(cls, given: Any) -> Any:
        strays = [stray for stray, _ in zip(stray_fields(cls, given), range(5), strict=False)]
        if strays:
            raise PydanticCustomError("unknown_field", "{what}", {"what": "; ".join(strays)})
        return given


def stray_fields(model: type[BaseModel], given: Any, path: str = "") -> Iterator[str]:
    """Says of each part of `given` that cannot be meant what is wrong with it."""
    if not isinstance(given, dict):
        return
    for name, value in given.items():
        place = f"{path}{name}"
        field = model.model_fields.get(name)
        if field is None:
            yield f"{place[:100]!r} is not a field" + _guess(name, model)
            continue
        nested = nested_model(field.annotation)
        parts = value if isinstance(value, list) else [value]
        for part in parts:
            if nested:
                yield from stray_fields(nested, part, f"{place}.")
            else:
                yield from _unusable(part, place)


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model within an annotation such as `tuple[Input, ...]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := nested_model(part))), None)


def _guess(name: str, model: type[BaseModel]) -> str:
    close = difflib.get_close_matches(name, model.model_fields, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _unusable(value: Any, place: str) -> Iterator[str]:
    match value:
        case dict():
            for name, inner in value.items():
                yield from _unusable(name, place)
                yield from _unusable(inner, f"{place}.{name}"[:100])
        case list():
            for inner in value:
                yield from _unusable(inner, place)
        case str() if "\0" in value:
            yield f"{place} holds a NUL character"
        case bool():
            return
        case int() if value not in INT64:
            yield f"{place} does not fit into 64 bits"
        case float() if not math.isfinite(value):
            yield f"{place} is not a finite number"
