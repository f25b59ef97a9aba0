"""Which installations of the platform are on this machine, as far as this user started them.

An address does not tell: behind `ssh -L` another machine's is 127.0.0.1 too, and two machines may have one name. So
each installation has a random id, which its API gives and which `nabla up` writes into its home; and where this
user's homes are is noted in a folder of /tmp, which no two machines share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nabla import jsonfile
from nabla.errors import BadConfig


def is_here(installation_id: str, noted: Path | None = None) -> bool:
    """Whether the installation of that id is one of these; `noted` is a seam for tests."""
    return bool(installation_id) and any(known == installation_id for known in _ids(noted or notes()))


def notes() -> Path:
    """As infra.local.installation makes it. Windows has neither the platform nor user numbers."""
    return Path(f"/tmp/nabla-homes-{os.getuid() if os.name == 'posix' else 0}")


def _ids(noted: Path) -> Iterator[str]:
    for note in sorted(noted.glob("*.home")) if _is_ours(noted) else ():
        try:
            found = jsonfile.read(Path(note.read_text(encoding="utf-8")) / "context.json")
        except (OSError, ValueError, BadConfig):  # another one may still be the right one
            continue
        yield str(found.get("installation_id") or "")


def _is_ours(folder: Path) -> bool:
    """In /tmp anybody may put a folder of that name first."""
    try:
        return os.name == "posix" and folder.lstat().st_uid == os.getuid()
    except OSError:
        return False
