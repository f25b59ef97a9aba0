"""How a job's template names secrets: a value `secret:NAME` stands for the secret's own value, at the start.

It may stand wherever people put credentials: in variables, and as user and password of an image's registry or of the
workspace's source. A plain text that begins with `secret:` is written with a second colon: `secret::text`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from libs.common.contracts.messages import Container, JobTemplate, Source

PREFIX = "secret:"
ESCAPED = "secret::"
_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9_.-]{1,100}")
# How a name must look, for people.
NAME_RULE = "1 to 100 of the letters A-Z and a-z, digits, '_', '.' and '-', and not dots alone"


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def name_in(value: str) -> str | None:
    """What the value names, which need not be a name that a secret can have; None for a plain text."""
    if not value.startswith(PREFIX) or value.startswith(ESCAPED):
        return None
    return value.removeprefix(PREFIX)


def plain(value: str) -> str:
    """The text that a value without a secret stands for."""
    return PREFIX + value.removeprefix(ESCAPED) if value.startswith(ESCAPED) else value


def places_in(template: JobTemplate) -> Iterator[tuple[str, str]]:
    """Every field that may name a secret, and its value."""
    yield from ((f"env.{name}", value) for name, value in template.env.items())
    yield from _of_container("container", template.container)
    yield "source.username", template.source.username
    yield "source.password", template.source.password
    for index, role in enumerate(template.gang.roles):
        place = f"gang.roles.{index}"
        yield from ((f"{place}.env.{name}", value) for name, value in role.env.items())
        yield from _of_container(f"{place}.container", role.container)


def _of_container(place: str, container: Container) -> Iterator[tuple[str, str]]:
    yield f"{place}.registry_username", container.registry_username
    yield f"{place}.registry_password", container.registry_password


def names_in(template: JobTemplate) -> frozenset[str]:
    """The names of all secrets that the template asks for."""
    return frozenset(name for _, value in places_in(template) if (name := name_in(value)) is not None)


def with_credentials(template: JobTemplate, values: Mapping[str, str]) -> JobTemplate:
    """The template with the values of all credentials but those in variables: for memory alone, never to be kept.

    Raises:
        KeyError: a name without a value.
    """

    def value_of(text: str) -> str:
        name = name_in(text)
        return plain(text) if name is None else values[name]

    roles = tuple(
        role.model_copy(update={"container": _container(role.container, value_of)}) for role in template.gang.roles
    )
    return template.model_copy(
        update={
            "container": _container(template.container, value_of),
            "source": _source(template.source, value_of),
            "gang": template.gang.model_copy(update={"roles": roles}),
        }
    )


def variables(env: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """A job's variables, apart: those with their texts, and those whose values are secrets, with the secrets' names."""
    named = {variable: name for variable, value in env.items() if (name := name_in(value)) is not None}
    return {variable: plain(value) for variable, value in env.items() if variable not in named}, named


def _container(container: Container, value_of: Callable[[str], str]) -> Container:
    username, password = value_of(container.registry_username), value_of(container.registry_password)
    return container.model_copy(update={"registry_username": username, "registry_password": password})


def _source(source: Source, value_of: Callable[[str], str]) -> Source:
    update = {"username": value_of(source.username), "password": value_of(source.password)}
    return source.model_copy(update=update)
