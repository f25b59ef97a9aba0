"""Between the API's JSON and the records of nabla.objects.

Reading is tolerant in one direction only: members that a class does not know are left out and missing ones keep their
empty value, so an older client works with a newer server.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Dict, Mapping, Tuple, Type, TypeVar, Union, get_type_hints

from nabla.errors import NablaError
from nabla.record import Record, values_of

T = TypeVar("T", bound=Record)


def decode(cls: Type[T], data: object) -> T:
    """A record from the JSON of an answer; NablaError when it is none."""
    try:
        return _record(cls, data)
    except (ValueError, TypeError) as error:
        raise NablaError(
            f"The server's answer cannot be read: {error}.",
            "Is the client older or newer than the server? `nabla doctor` compares them.",
        ) from error


def _record(cls: Type[T], data: object) -> T:
    if not isinstance(data, dict):
        raise ValueError(f"expected an object for {cls.__name__}, got {type(data).__name__}")
    hints = _hints(cls)
    return cls(**{k: _value(hints[k], v) for k, v in data.items() if k in hints and v is not None})


def as_json(value: object) -> object:
    """The JSON of the API again: for `--json` and for request bodies."""
    if isinstance(value, Record):
        return {name: as_json(item) for name, item in values_of(value).items()}
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value


_known_hints: Dict[type, Dict[str, object]] = {}


def _hints(cls: type) -> Dict[str, object]:
    if cls not in _known_hints:
        _known_hints[cls] = dict(get_type_hints(cls))
    return _known_hints[cls]


def _value(hint: object, data: object) -> object:
    origin: object = getattr(hint, "__origin__", None)
    arguments: Tuple[object, ...] = getattr(hint, "__args__", ())
    if origin is Union:
        return _value(arguments[0], data)
    if origin is tuple and isinstance(data, list):
        return tuple(_value(arguments[0], item) for item in data)
    if isinstance(data, dict) and not isinstance(hint, type):
        return {key: _value(arguments[1], item) for key, item in data.items()}
    if hint is datetime:
        return parse_time(str(data))
    if isinstance(hint, type) and issubclass(hint, Record):
        return _record(hint, data)
    return hint(data) if isinstance(hint, type) else data


_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)?$")


def parse_time(text: str) -> datetime:
    """RFC 3339 with any number of decimals, which `fromisoformat` reads only from Python 3.11 on."""
    match = _TIME.match(text)
    if match is None:
        raise ValueError(f"not an RFC 3339 time: {text!r}")
    seconds, decimals, zone = match.groups()
    moment = datetime.fromisoformat(seconds + (zone or "Z").replace("Z", "+00:00"))
    return moment + timedelta(microseconds=int((decimals or "0")[:6].ljust(6, "0")))
