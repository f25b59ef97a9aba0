"""Named crash points: where a test can make a service die, to prove that nothing is lost there.

`NABLA_FAULT=scheduler.after_commit:3` ends the process, as SIGKILL would, on the third pass of that point.
Without the variable a point costs one comparison.
"""

from __future__ import annotations

import os

_point, _, _count = os.environ.get("NABLA_FAULT", "").partition(":")
_passes_left = int(_count or 1)


def crash_point(name: str) -> None:
    global _passes_left  # noqa: PLW0603 - a process has one countdown
    if name != _point:
        return
    _passes_left -= 1
    if _passes_left == 0:
        os._exit(137)
