"""A zygote that hangs is no better than a dead one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from services.executor.adapters.attempt_folder import AttemptFolder, AttemptSpec
from services.executor.adapters.zygote import ZygoteUnavailable
from services.executor.adapters.zygote_keeper import ZygoteKeeper
from tests.integration.executor.attempts import JOB_UID, eventually

pytestmark = pytest.mark.integration


def test_a_zygote_that_is_alive_and_silent_is_replaced(node_dir: Path) -> None:
    node_dir.chmod(0o711)
    spec = AttemptSpec(attempt_id="t1", job_id="js1", command="true", isolation="process", run_as_uid=JOB_UID)
    folder = AttemptFolder.create(node_dir, spec)
    keeper = ZygoteKeeper(node_dir)
    try:
        hung = keeper.process
        hung.send_signal(signal.SIGSTOP)
        with pytest.raises(ZygoteUnavailable):
            keeper.start_attempt(folder.path, answers_s=0.3)
        assert hung.poll() is not None
        assert keeper.start_attempt(folder.path) > 0
        record = eventually(folder.read_exit, "the end of the attempt")
        assert record.code == 0
        eventually(lambda: not folder.shim_is_alive(), "the end of the shim")
    finally:
        keeper.end()


def test_one_that_another_caller_replaced_is_not_replaced_again(node_dir: Path) -> None:
    keeper = ZygoteKeeper(node_dir)
    try:
        first = keeper.process
        keeper.replace(first)
        second = keeper.process
        keeper.replace(first)
        assert keeper.process is second
        assert second.poll() is None
    finally:
        keeper.end()
