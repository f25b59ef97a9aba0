"""How a template names secrets, and what stands there once they are known."""

from __future__ import annotations

import pytest

from libs.common import secret_refs
from libs.common.contracts.messages import Container, Gang, JobTemplate, Role, Source
from libs.common.errors import Invalid
from libs.common.secret_transfer import NotForUs, Reader, Writer

pytestmark = pytest.mark.unit

EVERYWHERE = JobTemplate(
    env={"A": "secret:a", "PLAIN": "text", "ESCAPED": "secret::text", "TWICE": "secret:::x", "ALSO_A": "secret:a"},
    container=Container(image="i", registry_username="me", registry_password="secret:b"),
    source=Source(kind="git", url="u", username="secret:c", password="secret:d"),
    gang=Gang(
        type="torch",
        roles=(Role(name="worker", env={"E": "secret:e"}, container=Container(registry_username="secret:f")),),
    ),
)


def test_names_are_found_wherever_credentials_may_stand() -> None:
    assert secret_refs.names_in(EVERYWHERE) == set("abcdef")


def test_credentials_have_values_for_names_and_variables_keep_their_references() -> None:
    values = {name: f"value of {name}" for name in "abcdef"}
    resolved = secret_refs.with_credentials(EVERYWHERE, values)
    container, source, role = resolved.container, resolved.source, resolved.gang.roles[0]
    assert (container.image, container.registry_username, container.registry_password) == ("i", "me", "value of b")
    assert (source.url, source.username, source.password) == ("u", "value of c", "value of d")
    assert (role.name, role.container.registry_username) == ("worker", "value of f")
    assert (resolved.env, role.env) == (EVERYWHERE.env, {"E": "secret:e"})
    assert EVERYWHERE.source.password == "secret:d"


def test_variables_are_told_apart_and_escapes_are_texts() -> None:
    plain, named = secret_refs.variables(EVERYWHERE.env)
    assert plain == {"PLAIN": "text", "ESCAPED": "secret:text", "TWICE": "secret::x"}
    assert named == {"A": "a", "ALSO_A": "a"}


def test_every_text_field_for_credentials_is_a_place() -> None:
    """One that is added to the contract and forgotten here would reach a node as a plain secret:NAME."""
    names = {f"{kind.__name__}.{name}" for kind in (Container, Source) for name in kind.model_fields}
    credentials = {name for name in names if name.endswith(("username", "password", "token", "key"))}
    assert credentials == {
        "Container.registry_username",
        "Container.registry_password",
        "Source.username",
        "Source.password",
    }


def test_a_name_without_a_value_is_an_error_and_never_left_standing() -> None:
    with pytest.raises(KeyError):
        secret_refs.with_credentials(EVERYWHERE, {})


def test_a_value_crosses_the_bus_for_one_reader_and_under_one_name() -> None:
    reader = Reader()
    sealed = Writer(reader.public_key).seal("A", "é\n".encode())
    assert reader.open("A", sealed) == "é\n"
    for other, name in ((Reader(), "A"), (reader, "B")):
        with pytest.raises(NotForUs):
            other.open(name, sealed)
    with pytest.raises(NotForUs):
        reader.open("A", "not base64")
    with pytest.raises(Invalid):
        Writer("c2hvcnQ=")
