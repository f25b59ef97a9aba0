"""What a person sees of an installation."""

from __future__ import annotations

import shutil
import sys
import time


def say(text: str) -> None:
    print(text, flush=True)


class Line:
    """One line of progress: redrawn in a terminal, written again every ten seconds anywhere else."""

    def __init__(self, title: str) -> None:
        self.title, self.began, self.shown, self.detail = title, time.monotonic(), 0.0, ""
        self.terminal = sys.stdout.isatty()

    def show(self, detail: str = "") -> None:
        self.detail = detail or self.detail
        now = time.monotonic()
        if now - self.shown < (0.1 if self.terminal else 10.0):
            return
        first, self.shown = not self.shown, now
        if self.terminal or not first:
            self._write(f"  {self.title:<20} {now - self.began:4.0f} s  {self.detail}")

    def end(self, outcome: str = "done") -> None:
        text = f"  {self.title:<20} {time.monotonic() - self.began:4.0f} s  {outcome}"
        self._write(text)
        if self.terminal:
            print(flush=True)

    def _write(self, text: str) -> None:
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]}\033[K", end="", flush=True)
        else:
            say(text)
