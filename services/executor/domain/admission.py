"""When a machine may join: with a ticket that an admin had made, once, and soon after."""

from __future__ import annotations

from datetime import timedelta

from services.executor.domain.isolation import is_loopback

TICKET_LIFE = timedelta(hours=1)


def is_good(expires_us: int, used_us: int | None, now_us: int) -> bool:
    return used_us is None and now_us < expires_us


def why_closed(ray_address: str) -> str:
    """Why no other machine can join the cluster at all, or nothing."""
    if not ray_address:
        return "the Ray cluster is still starting"
    if is_loopback(ray_address.rpartition(":")[0]):
        return f"Ray listens on {ray_address}, which no other machine reaches"
    return ""
