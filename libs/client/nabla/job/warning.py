"""Warnings that cannot end a job."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    try:
        warnings.warn(f"nabla: {message}", RuntimeWarning, stacklevel=3)
    except RuntimeWarning as warning:  # python -W error is meant for the user's code
        print(warning, file=sys.stderr)
