"""A small disk that a test can fill without harm to anybody."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FILLER = "filler"


@contextmanager
def small_disk_at(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, of a few megabytes of memory; the test is skipped where it cannot be had."""
    if os.geteuid() != 0:
        pytest.skip("filling a disk: mounting a small one needs root")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "nabla-test", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True, timeout=20).returncode:
        pytest.skip("filling a disk: root may not mount a tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


def fill(disk: Path) -> None:
    """Leaves no byte on it; removing the file FILLER gives all back."""
    with (disk / FILLER).open("ab", buffering=0) as filler:
        for size in (65_536, 512, 1):
            with contextlib.suppress(_NoSpace):
                while True:
                    _write(filler.fileno(), size)


def free(disk: Path) -> None:
    (disk / FILLER).unlink()


class _NoSpace(Exception):
    """Nothing more fits."""


def _write(descriptor: int, size: int) -> None:
    try:
        os.write(descriptor, b"\0" * size)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _NoSpace from None
