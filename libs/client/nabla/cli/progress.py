"""How far reading, packing, uploading and downloading are, on standard error."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Callable

from nabla.cli.output import console, note
from nabla.hints import readable_size

if TYPE_CHECKING:
    from nabla.progress import Progress, Stages

EVERY_S = 10.0


@contextlib.contextmanager
def progress() -> Iterator[Stages]:
    """A bar where somebody looks; elsewhere, as in a log, a line every ten seconds, and none for what is quick."""
    if not sys.stderr.isatty():
        yield Lines(note).begin
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=console(stderr=True), transient=True) as bar:

        def begin(title: str, total_bytes: int | None) -> Progress:
            for ended in bar.task_ids:
                bar.remove_task(ended)
            task = bar.add_task(title, total=total_bytes)
            return lambda size_bytes: bar.advance(task, size_bytes)

        yield begin


class Lines:
    """One stage after the other, in words. Uploads tell their bytes from several threads."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._said_at = clock()
        self._lock = threading.Lock()
        self._done_bytes = 0

    def begin(self, title: str, total_bytes: int | None) -> Progress:
        self._done_bytes = 0
        of_all = "" if total_bytes is None else f" of {readable_size(total_bytes)}"

        def told(size_bytes: int) -> None:
            with self._lock:
                self._done_bytes += size_bytes
                now = self._clock()
                if now - self._said_at < EVERY_S:
                    return
                self._said_at = now
                self._say(f"{title}: {readable_size(self._done_bytes)}{of_all}")

        return told
