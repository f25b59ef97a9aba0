"""The installation's own machine types, from a file that may change while the service runs."""

from __future__ import annotations

from pathlib import Path

from libs.common.errors import Conflict
from services.scheduler.domain.machine_types import MachineTypes, WrongMachineTypes, read_types


class MachineFile:
    """Answers `ports.MachineTypeSource` from a TOML file, read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at: tuple[int, int] | None = None
        self._types: MachineTypes = {}

    def types(self) -> MachineTypes | None:
        try:
            found = self._path.stat()
            version = (found.st_mtime_ns, found.st_size)
            if version != self._read_at:
                self._types, self._read_at = read_types(self._path.read_text()), version
        except FileNotFoundError:
            return None
        except (WrongMachineTypes, OSError, UnicodeDecodeError) as error:
            detail = f"The machine types in {self._path} cannot be read: {error}."
            raise Conflict("machine_types_wrong", detail, "Whoever runs the installation has to correct it.") from error
        return self._types
