"""How the address of a server is written."""

from __future__ import annotations


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, or the near end of an ssh tunnel."""
    return host in ("localhost", "::1") or host.startswith("127.")


def front_door(url: str) -> str:
    """The address without slash and API prefix, so that both ways of writing it work."""
    url = url.rstrip("/")
    return url[: -len("/api/v1")] if url.endswith("/api/v1") else url
