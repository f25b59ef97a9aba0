"""Small JSON files of the client's own, replaced whole so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from nabla.errors import BadConfig


def read(path: Path) -> dict[str, object]:
    """Empty when there is no file; BadConfig when there is one that cannot be used."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise BadConfig(f"Cannot read {path}: {error}.", "Correct the file, or delete it.") from error
    if not isinstance(data, dict):
        raise BadConfig(f"{path} does not hold a JSON object.", "Correct the file, or delete it.")
    return data


def write(path: Path, data: dict[str, object]) -> None:
    """Replaces the file; only its owner may read it (0600), since it may hold tokens."""
    import tempfile

    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=str(path.parent), prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(data, stream, indent=1, sort_keys=True)
        os.replace(name, path)
    except OSError as error:
        if name:
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise BadConfig(f"Cannot write {path}: {error}.", "Check the folder's owner and free space.") from error
