"""Immutable records that cost nothing to define.

Each frozen dataclass generates and compiles its methods when its module is imported. Thirty of them took 30 ms, at
every start of the command line; these share the methods below. Type checkers see them as frozen dataclasses.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Dict, Mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing_extensions import Never, dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda cls: cls


EMPTY: Mapping[str, Never] = MappingProxyType({})


@dataclass_transform(frozen_default=True)
class Record:
    """Fields are the annotated names of the class, each with a default, which is immutable as well."""

    if not TYPE_CHECKING:

        def __init__(self, *values: object, **named: object) -> None:
            names = type(self).__annotations__
            given = dict(zip(names, values), **named)
            if len(given) < len(values) or not given.keys() <= names.keys():
                raise TypeError(f"{type(self).__name__} has no such fields: {values} {named}")
            self.__dict__.update(given)

        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(f"{type(self).__name__} is immutable")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and values_of(self) == values_of(other)

    def __hash__(self) -> int:
        return hash(repr(values_of(self)))

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in values_of(self).items() if name not in _HIDDEN)
        return f"{type(self).__name__}({', '.join(shown)})"


def values_of(record: Record) -> Dict[str, object]:
    """The fields with their values, in the order of the class."""
    return {name: getattr(record, name) for name in type(record).__annotations__}


# They would end up in logs.
_HIDDEN = frozenset({"secret", "endpoint_token"})
