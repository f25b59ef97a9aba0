"""The code of a node, as a machine that joins fetches it: the sources of this checkout, and nothing of its data."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
JOIN = Path("infra/node/join.py")
# What the agent, its keeper and the installation of their packages are made of.
PARTS = ("services", "libs", "infra", "pyproject.toml")
LEFT_OUT = frozenset({"__pycache__", "node_modules", ".git"})
PLACE = "SETTINGS: dict[str, str] = {}"


@cache
def bundle() -> bytes:
    """A gzipped tar of regular files, the same bytes for the same code."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for path in sorted(_files()):
            member = tarfile.TarInfo(str(path.relative_to(ROOT)))
            content = path.read_bytes()
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def join_script(url: str, ticket: str, python_version: str, ray_version: str) -> str:
    """The program that a machine runs to join, with what it has to know written into it."""
    known = {"url": url, "ticket": ticket, "python": python_version, "ray": ray_version}
    program = (ROOT / JOIN).read_text()
    assert PLACE in program
    return program.replace(PLACE, f"{PLACE[:-2]}{json.dumps(known)}", 1)


def _files() -> list[Path]:
    found = []
    for part in PARTS:
        top = ROOT / part
        inner = top.rglob("*") if top.is_dir() else [top]
        found += [path for path in inner if path.is_file() and not path.is_symlink() and not LEFT_OUT & set(path.parts)]
    return [path for path in found if not any(name.startswith(".") for name in path.relative_to(ROOT).parts)]
