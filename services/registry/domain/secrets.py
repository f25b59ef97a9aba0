"""Secrets: their names and values, whose goes first, and to what a sealed one is bound.

A secret has versions and no states: set again it is one version more, deleted its row is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from libs.common.contracts.messages import Secret
from libs.common.errors import Forbidden, Invalid, NotFound, TooLarge
from libs.common.secret_refs import NAME_RULE, is_name

LONGEST_VALUE_BYTES = 64 * 1024
MOST_NAMES = 64


def checked_name(name: str) -> str:
    if not is_name(name):
        detail = f"A secret's name has {NAME_RULE}."
        raise Invalid("bad_name", detail, "Choose another name, such as `HF_TOKEN`.")
    return name


def checked_value(value: str) -> str:
    """The value; what is wrong with it is said without repeating any of it.

    Raises:
        Invalid: empty, or what no environment variable can hold.
        TooLarge.
    """
    if not value:
        raise Invalid("bad_value", "A secret's value is not empty.", "To end a secret, delete it.")
    if "\0" in value:
        detail = "The value has a NUL character, which no environment variable can hold."
        raise Invalid("bad_value", detail, "Set binary data as base64, and decode it in the job.")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise Invalid("bad_value", "The value is not text.", "Set binary data as base64.") from None
    if size > LONGEST_VALUE_BYTES:
        detail = f"The value is {size:,} bytes long; a secret has at most {LONGEST_VALUE_BYTES:,}."
        raise TooLarge("value_too_large", detail, "Put large files into /storage or the workspace.")
    return value


def checked_names(names: Collection[str]) -> tuple[str, ...]:
    if len(names) > MOST_NAMES:
        detail = f"A job names {len(names)} secrets; {MOST_NAMES} is the most."
        raise TooLarge("too_many_secrets", detail, "Put several values into one secret.")
    return tuple(sorted(set(names)))


def binding(secret: Secret) -> bytes:
    """What the sealed value is bound to: a row whose place was taken by another does not open.

    Whose it is, is said by its project's id, which no other team's project has, so that a project can be moved.
    """
    owner = f"project:{secret.project_id}" if secret.project_id else f"team:{secret.team_id}"
    return f"nabla-secret|{owner}|{secret.name}|{secret.version}|{secret.id}".encode()


def effective(found: Iterable[Secret], names: Iterable[str]) -> Mapping[str, Secret]:
    """By name, what a job of the project gets: the project's own before the team's.

    Raises:
        NotFound: there is none by one of the names.
    """
    chosen: dict[str, Secret] = {}
    for secret in sorted(found, key=lambda secret: bool(secret.project_id)):
        chosen[secret.name] = secret
    missing = [name for name in names if name not in chosen]
    if missing:
        raise no_secret(*missing)
    return {name: chosen[name] for name in names}


def no_secret(*names: str) -> NotFound:
    shown = ", ".join(name[:100] for name in names)
    detail = f"There is no secret {shown} in this project or team."
    return NotFound("secret_not_found", detail, f"`nabla secrets set {names[0][:100]}` makes it.")


def check_named(asked: Iterable[str], named: Collection[str]) -> None:
    """Raises Forbidden for a name that the attempt's job does not have."""
    strange = sorted(set(asked) - set(named))
    if strange:
        detail = f"The job does not name the secret {strange[0][:100]}."
        raise Forbidden("secret_not_named", detail, "A job gets the secrets that its template names.")
