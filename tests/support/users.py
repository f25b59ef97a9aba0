"""An ordinary user, whom root can be for a while: root reads every file whatever its mode."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """A folder of an ordinary user, whose rights this whole process has meanwhile.

    Not in pytest's own folder, which is closed to others.
    """
    before = os.geteuid()
    with tempfile.TemporaryDirectory(prefix="nabla-user-") as name:
        if before == 0:
            os.chown(name, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            os.seteuid(before)
