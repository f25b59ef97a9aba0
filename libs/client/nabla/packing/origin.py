"""Where a workspace comes from, for people who look at the job later: folder, and git's commit, branch, dirty."""

from __future__ import annotations

import subprocess
from pathlib import Path

GIT = ("git", "--no-optional-locks", "status", "--porcelain=v2", "--branch")
PATIENCE_S = 5.0


def describe_origin(folder: Path) -> dict[str, str]:
    """At least {"folder": name}. Without git, or where it is slow, that is all."""
    origin = {"folder": folder.name or str(folder)}
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        return origin
    try:
        done = subprocess.run(
            GIT, cwd=folder, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return origin
    return {**origin, **parse_status(done.stdout)}


def parse_status(text: str) -> dict[str, str]:
    """From `git status --porcelain=v2 --branch`."""
    lines = text.splitlines()
    heads = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# branch."))
    found = {"commit": heads.get("branch.oid", ""), "branch": heads.get("branch.head", "")}
    dirty = any(line and not line.startswith("#") for line in lines)
    known = {name: value for name, value in found.items() if value and not value.startswith("(")}
    return {**known, "dirty": "true" if dirty else "false"}
