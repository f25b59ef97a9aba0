"""Option values as people write them."""

from __future__ import annotations

import re

import click

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?$", re.IGNORECASE)
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?$", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def size(text: str) -> int:
    """4G, 512M, 1.5GiB in bytes: binary units always, as memory is counted."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size; write it like 512M or 4G.")
    return int(float(match.group(1)) * 1024 ** " kmgt".index(match.group(2).lower() or " "))


def span(text: str) -> float:
    """90, 90s, 30m, 2h, 1d in seconds."""
    match = _SPAN.match(text.strip())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a time span; write it like 90s, 30m or 2h.")
    return float(match.group(1)) * _SECONDS[(match.group(2) or "s").lower()]


def named_version(text: str) -> tuple[str, int]:
    """NAME or NAME:VERSION; version 0 is the newest."""
    name, colon, version = text.partition(":")
    if not name or (colon and not version.isdigit()):
        raise click.BadParameter(f"{text!r} is not NAME or NAME:VERSION, such as digits:2.")
    return name, int(version or 0)


def pairs(texts: tuple[str, ...], option: str) -> dict[str, str]:
    """KEY=VALUE, any number of times."""
    split = [text.partition("=") for text in texts]
    wrong = next((key for key, equals, _ in split if not (key and equals)), None)
    if wrong is not None:
        raise click.BadParameter(f"{wrong!r} is not KEY=VALUE.", param_hint=option)
    return {key: value for key, _, value in split}


def numbers(texts: tuple[str, ...], option: str) -> dict[str, float]:
    try:
        return {key: float(value) for key, value in pairs(texts, option).items()}
    except ValueError as error:
        raise click.BadParameter(f"{error}; write NAME=NUMBER.", param_hint=option) from error
