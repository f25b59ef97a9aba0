"""Names of container images that may be asked for: engines run with more rights than who asks."""

from __future__ import annotations

import re

MAX_NAME_LENGTH = 512
# Made by the platform for one team; nobody names them.
OWN_PREFIX = "localhost/nabla-own-"

_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?)"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(
    rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?"
)
# Engines take `dir:...` or `docker-archive:...` for other ways to get an image, such as files of the node.
_TRANSPORTS = frozenset(
    {"containers-storage", "dir", "docker", "docker-archive", "docker-daemon", "oci", "oci-archive", "ostree", "sif"}
)
_ID = re.compile(r"[0-9a-f]{4,64}")


def name_problem(name: str) -> str:
    """Why this names no image that may be asked for, or ""."""
    if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        return f"{name[:80]!r} is not the name of an image, such as python:3.12 or registry.example/team/image:tag"
    if name.split(":", 1)[0] in _TRANSPORTS:
        return f"{name[:80]!r} would be fetched by other means than from a registry"
    if _ID.fullmatch(name):
        return f"{name[:80]!r} is an id of one machine alone; an image is asked for by its name"
    if name.startswith(OWN_PREFIX):
        return f"{name[:80]!r} belongs to the platform"
    return ""
