"""Container images as a node sees them: where they come from, who is in them, which of them stay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.executor.domain.beginnings import sounds_passing

LOCAL = "localhost/"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}


@dataclass(frozen=True, slots=True)
class Kept:
    """An image in the bounded cache."""

    id: str
    size_bytes: int
    used_us: int


@dataclass(frozen=True, slots=True)
class BadUser:
    """Nobody of the image's; the text says why, for the user to read."""

    detail: str


def registry_of(name: str) -> str:
    """The host that an image is fetched from; "" where the name says none and the engine chooses."""
    first, slash, _ = name.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else ""


def folder_name(name: str) -> str:
    """The folder below `images/` that an administrator unpacks this image into."""
    return re.sub(r"[/:@]", "_", name)


def user_of(wanted: str, users: Mapping[str, tuple[int, int]], groups: Mapping[str, int]) -> tuple[int, int] | BadUser:
    """Whom a job runs as inside.

    Args:
        wanted: a name or number, and after a colon a group's.
        users: of the image, by name: number and group.
    """
    user, colon, group = wanted.partition(":")
    if user.isdigit():
        uid, gid = int(user), next((pair[1] for pair in users.values() if pair[0] == int(user)), 0)
    elif user in users:
        uid, gid = users[user]
    else:
        return BadUser(f"the image has no user {user!r}")
    if not colon:
        return uid, gid
    if group.isdigit():
        return uid, int(group)
    if group in groups:
        return uid, groups[group]
    return BadUser(f"the image has no group {group!r}")


def accounts_in(lines: Iterable[str]) -> dict[str, tuple[int, int]]:
    """The users in an image's /etc/passwd."""
    found = {}
    for line in lines:
        words = line.split(":")
        if len(words) > 3 and words[2].isdigit() and words[3].isdigit():
            found[words[0]] = (int(words[2]), int(words[3]))
    return found


def groups_in(lines: Iterable[str]) -> dict[str, int]:
    """The groups in an image's /etc/group."""
    words = [line.split(":") for line in lines]
    return {word[0]: int(word[2]) for word in words if len(word) > 2 and word[2].isdigit()}


def too_many(kept: Iterable[Kept], most_bytes: int, used: Iterable[str]) -> list[str]:
    """The images that go so that the others fit: the longest unused, and none in use."""
    held, gone = set(used), list[str]()
    by_age = sorted(kept, key=lambda image: image.used_us)
    total = sum(image.size_bytes for image in by_age)
    for image in by_age:
        if total <= most_bytes:
            break
        if image.id not in held:
            gone.append(image.id)
            total -= image.size_bytes
    return gone


def other_machine(architecture: str, machine: str) -> str:
    """Why an image's programs do not run here; "" when they do, or when one of the two is not known.

    Args:
        architecture: as images name it.
        machine: as the kernel names it.
    """
    own = _ARCHITECTURES.get(machine, "")
    if architecture in ("", own) or not own:
        return ""
    return (
        f"the image is for {architecture}, and this node is {own}: its programs cannot run here; name an image that "
        f"was built for {own} too"
    )


def pull_problem(name: str, said: str, *, has_credentials: bool) -> tuple[str, bool]:
    """Why an image could not be fetched, for people, from what the engine said; and whether that may pass."""
    words = said.lower()
    reason = said.strip().splitlines()[-1][:300] if said.strip() else "no reason given"
    if sounds_passing(said):
        return f"{name} cannot be fetched now: {reason}", True
    if any(sign in words for sign in ("manifest unknown", "not found", "name unknown", "does not exist")):
        return f"there is no image {name} ({reason})", False
    if any(sign in words for sign in ("unauthorized", "denied", "authentication required", "forbidden")):
        what = "these credentials" if has_credentials else "--registry-username and --registry-password"
        advice = f"check {what}" if has_credentials else f"an image that is not public needs {what}"
        return f"the registry does not give out {name}: {advice} ({reason})", False
    if "short-name" in words or "unqualified-search" in words:
        return f"the node does not know which registry {name} is in: write the registry's host before it", False
    return f"{name} cannot be fetched: {reason}", False
