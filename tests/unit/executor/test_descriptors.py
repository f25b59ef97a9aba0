"""A forked shim keeps no file of the zygote's open, however many descriptors a process may have."""

from __future__ import annotations

import os
import resource

import pytest

from services.executor.adapters.attempts.forward import keep_only

pytestmark = pytest.mark.unit


def test_only_the_kept_descriptors_stay_open() -> None:
    report, report_write = os.pipe()
    child = os.fork()
    if child == 0:
        high = os.dup2(report, 300)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        keep_only([report_write])
        still_open = [number for number in (report, high) if is_open(number)]
        os.write(report_write, repr(still_open).encode())
        os._exit(0)
    os.close(report_write)
    os.waitpid(child, 0)
    with os.fdopen(report) as file:
        assert file.read() == "[]"


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
