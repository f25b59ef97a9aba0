"""Tokens and sign-in codes: how long they live, what they allow, and how their hashes look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from libs.common.errors import Forbidden, Invalid, Unauthenticated

SCOPES = ("read", "write", "admin")
DEFAULT_TOKEN_LIFE = timedelta(days=90)
LONGEST_TOKEN_LIFE = timedelta(days=366)
SESSION_LIFE = timedelta(days=30)
SIGN_IN_LIFE = timedelta(minutes=10)
# The first token is made good again for a year each time its remaining life falls below half of that.
FIRST_TOKEN_LIFE = timedelta(days=366)
LONGEST_LABEL = 100

_HASH = re.compile(r"[0-9a-f]{64}")
_FIRST_TOKEN = re.compile(r"nbl_[A-Za-z0-9_-]{32,}")


def is_live(expires_at: datetime, revoked_at: datetime | None, now: datetime) -> bool:
    return revoked_at is None and now < expires_at


def no_valid_token() -> Unauthenticated:
    """The one answer for unknown, expired and revoked tokens alike: which of them it was is nobody's business."""
    return Unauthenticated(
        "token_not_valid", "This token is not known, has expired or was revoked.", "Sign in again with `nabla login`."
    )


def no_valid_code() -> Unauthenticated:
    """The one answer for unknown, used and expired sign-in codes alike."""
    return Unauthenticated(
        "sign_in_not_valid",
        "This sign-in link is not known, was used before or is older than ten minutes.",
        "Make a new one with `nabla open`.",
    )


def is_hash(text: str) -> bool:
    """Whether `text` is a SHA-256 in lower-case hex."""
    return _HASH.fullmatch(text) is not None


def checked_hash(text: str, field: str) -> str:
    """Raises Invalid unless `text` is a hash; a secret sent by mistake must never be stored."""
    if not is_hash(text):
        raise Invalid("bad_hash", f"{field} is not a SHA-256 in lower-case hex.", "Send the hash, never the secret.")
    return text


def checked_label(name: str) -> str:
    """A token's name, for people to know it again."""
    name = name.strip() or "token"
    if len(name) > LONGEST_LABEL or not name.isprintable():
        raise Invalid(
            "bad_name", f"A token's name has at most {LONGEST_LABEL} printable characters.", "Choose another."
        )
    return name


def granted_scopes(asked: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """The scopes of a new token, never more than `own`, those of the token that asks. Empty means all.

    Raises:
        Invalid: a scope that does not exist.
        Forbidden: the new token would allow more than the present one.
    """
    unknown = sorted(set(asked) - set(SCOPES))
    if unknown:
        raise Invalid("bad_scope", f"{', '.join(unknown)} is no scope.", f"Scopes are {', '.join(SCOPES)}.")
    scopes = tuple(scope for scope in SCOPES if scope in asked) or tuple(own)
    if own and not set(scopes) <= set(own):
        raise Forbidden(
            "scope_too_wide",
            f"A token limited to {', '.join(own)} cannot make one that allows {', '.join(scopes)}.",
            "Ask for fewer scopes, or use a token without limits.",
        )
    return scopes


def token_life(asked_s: float) -> timedelta:
    """How long a new token lives; 0 asks for the default.

    Raises:
        Invalid: negative, or longer than a year.
    """
    if asked_s == 0:
        return DEFAULT_TOKEN_LIFE
    if not 1 <= asked_s <= LONGEST_TOKEN_LIFE.total_seconds():
        longest = LONGEST_TOKEN_LIFE.days
        raise Invalid("bad_lifetime", f"A token lives between 1 second and {longest} days.", "Choose a time between.")
    return timedelta(seconds=asked_s)


def first_token(text: str) -> str:
    """The installation's first token, out of its file.

    Raises:
        ValueError: the file holds something else; its content is not repeated.
    """
    token = text.strip()
    if not _FIRST_TOKEN.fullmatch(token):
        raise ValueError("the bootstrap token file does not hold a token of the form nbl_...")
    return token
