"""Which project a folder runs in, remembered in the user's configuration rather than in the folder.

Kept by server, because the same folder may be a project here and another one there.
"""

from __future__ import annotations

import re
from pathlib import Path

from nabla import jsonfile, paths


class Folders:
    def __init__(self, path: Path | None = None) -> None:
        self._given = path

    @property
    def _path(self) -> Path:
        return self._given or paths.config_file().with_name("folders.json")

    def project(self, url: str, folder: Path) -> str:
        """The project's id, or an empty string."""
        return str(self._of(url).get(str(folder)) or "")

    def remember(self, url: str, folder: Path, project_id: str) -> None:
        data = jsonfile.read(self._path)
        jsonfile.write(self._path, {**data, url: {**self._of(url), str(folder): project_id}})

    def _of(self, url: str) -> dict[str, object]:
        entries = jsonfile.read(self._path).get(url)
        return entries if isinstance(entries, dict) else {}


def project_name(folder: Path) -> str:
    """A project's name from a folder's: lower case, digits and dashes, at most 60 characters."""
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")[:60].strip("-")
    return name or "default"
