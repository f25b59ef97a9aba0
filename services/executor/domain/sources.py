"""Where a workspace may come from besides a file set, and what of it is refused before anything is asked."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from services.executor.domain.beginnings import NotStarted

MAX_URL_LENGTH = 2000
AMAZON = "https://s3.amazonaws.com"
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
# What git takes for a ref, without what it reads as an option, a range or a pattern.
_REF = re.compile(r"(?!-)(?!.*(\.\.|//|@\{|\.lock(/|$)))[^\x00-\x20\x7f~^:?*\[\\]{1,250}(?<![./])")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


class BadSource(NotStarted):
    """The workspace cannot be fetched from there; the text says why, for the user to read."""


@dataclass(frozen=True, slots=True)
class S3Place:
    """An object: the server's URL, the bucket and the key."""

    endpoint: SplitResult
    bucket: str
    key: str


def checked_repository(url: str, plain_hosts: Collection[str]) -> str:
    """The URL as git gets it.

    Args:
        plain_hosts: `host` or `host:port` for which http is enough.

    Raises:
        BadSource.
    """
    url = url.removeprefix("git+")
    _checked_web(url, plain_hosts, "git's URL")
    return url


def checked_ref(ref: str) -> str:
    """Raises BadSource. Empty for the default branch."""
    if ref and not _REF.fullmatch(ref):
        raise BadSource(f"{ref[:80]!r} is not a commit, tag or branch of git")
    return ref


def is_commit(ref: str) -> bool:
    return bool(_COMMIT.fullmatch(ref))


def commit_of(listing: str, ref: str) -> str:
    """From `git ls-remote URL`: the commit that a ref means; as in git, a tag goes before a branch. "" for none."""
    heads = {}
    for line in listing.splitlines():
        commit, _, name = line.partition("\t")
        if _COMMIT.fullmatch(commit):
            heads[name] = commit
    if not ref:
        return heads.get("HEAD", "")
    names = [ref] if ref.startswith("refs/") else [f"refs/tags/{ref}", f"refs/heads/{ref}"]
    for name in names:
        found = heads.get(f"{name}^{{}}") or heads.get(name)  # of an annotated tag, what it is on
        if found:
            return found
    return ""


def checked_object(url: str, endpoint: str, plain_hosts: Collection[str]) -> S3Place:
    """Raises BadSource."""
    parts = urlsplit(url)
    key = parts.path.lstrip("/")
    if parts.scheme != "s3" or not _BUCKET.fullmatch(parts.netloc) or not key or len(url) > MAX_URL_LENGTH:
        raise BadSource(f"{url[:200]!r} is not s3://bucket/key")
    return S3Place(_checked_web(endpoint or AMAZON, plain_hosts, "the S3 endpoint"), parts.netloc, key)


def _checked_web(url: str, plain_hosts: Collection[str], what: str) -> SplitResult:
    shown = re.sub(r"//[^/@]*@", "//", url)[:200]
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BadSource(f"{what} {shown!r} cannot be read") from None
    if "@" in parts.netloc:
        raise BadSource(f"{what} has a user or password in it; give them apart, so that no log shows them")
    if not re.fullmatch(r"[!-~]+", url) or len(url) > MAX_URL_LENGTH or not parts.hostname or "\\" in url:
        raise BadSource(f"{what} {shown!r} cannot be read")
    plain_allowed = {parts.hostname, f"{parts.hostname}:{port}"} & set(plain_hosts)
    if parts.scheme != "https" and not (parts.scheme == "http" and plain_allowed):
        raise BadSource(f"{what} {shown!r} does not begin with https://")
    return parts
