"""How long work says how far it is, to whoever looks: a bar, a line now and then, or nobody."""

from __future__ import annotations

from typing import Callable, Optional

# Told how many bytes went by; negative when a broken transfer starts again.
Progress = Callable[[int], None]
# Told that a stage begins: what is done now, and how many bytes it will be, None when that is not known.
Stages = Callable[[str, Optional[int]], Progress]


def silent(size_bytes: int) -> None:
    """A Progress that nobody looks at."""


def unseen(title: str, total_bytes: Optional[int]) -> Progress:
    """Stages that nobody looks at."""
    return silent
