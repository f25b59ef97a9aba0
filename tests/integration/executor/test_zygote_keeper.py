"""A zygote that hangs is no better than a dead one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from socket import if_nameindex

import pytest

from libs.common.ids import new_id
from services.executor.adapters.agent.zygote_keeper import ZygoteKeeper
from services.executor.adapters.attempts import zygote
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec
from services.executor.adapters.networks.network_pool import SIZE
from services.executor.domain.network import Network, installation_tag, interface_prefix
from tests.integration.executor.attempts import JOB_UID, eventually
from tests.integration.executor.netspaces import why_no_network

pytestmark = pytest.mark.integration

# A zygote that is killed by its shim, once that is one and before it has told.
KILLED_BY_ITS_SHIM = """
import os, signal, sys, time
from services.executor.adapters.attempts import shim, zygote
become, me = shim.become_shim, os.getpid()
def become_and_kill(path):
    record = become(path)
    os.kill(me, signal.SIGKILL)
    while open(f"/proc/{me}/stat").read().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    return record
shim.become_shim = become_and_kill
zygote.serve(sys.argv[1], os.getppid())
"""


def attempt_that_ends(node_dir: Path) -> AttemptFolder:
    name = new_id("attempt")
    spec = AttemptSpec(attempt_id=name, job_id=name, command="true", isolation="process", run_as_uid=JOB_UID)
    return AttemptFolder.create(node_dir, spec)


def test_a_zygote_that_is_alive_and_silent_is_replaced(node_dir: Path) -> None:
    node_dir.chmod(0o711)
    spec = AttemptSpec(
        attempt_id=new_id("attempt"), job_id="js1", command="true", isolation="process", run_as_uid=JOB_UID
    )
    folder = AttemptFolder.create(node_dir, spec)
    keeper = ZygoteKeeper(node_dir)
    try:
        hung = keeper.process
        hung.send_signal(signal.SIGSTOP)
        with pytest.raises(zygote.ZygoteUnavailable):
            keeper.start_attempt(folder.path, answers_s=0.3)
        assert hung.poll() is not None
        assert keeper.start_attempt(folder.path) > 0
        record = eventually(folder.read_exit, "the end of the attempt")
        assert record.code == 0
        eventually(lambda: not folder.shim_is_alive(), "the end of the shim")
    finally:
        keeper.end()


def test_a_shim_outlives_a_zygote_that_ends_before_it_hears_of_it(node_dir: Path) -> None:
    node_dir.chmod(0o711)
    spec = AttemptSpec(
        attempt_id=new_id("attempt"), job_id="js2", command="true", isolation="process", run_as_uid=JOB_UID
    )
    folder = AttemptFolder.create(node_dir, spec)
    socket = node_dir / "zygote.sock"
    killed = subprocess.Popen([sys.executable, "-c", KILLED_BY_ITS_SHIM, str(socket)])
    try:
        with pytest.raises(zygote.ZygoteUnavailable):
            zygote.start_attempt(socket, folder.path)
        record = eventually(lambda: folder.read_exit() or not folder.shim_is_alive(), "the end of the attempt")
        assert getattr(record, "code", "the shim died with its zygote") == 0
    finally:
        assert killed.wait(30) == -signal.SIGKILL
        eventually(lambda: not folder.shim_is_alive(), "the end of the shim")


def test_one_that_was_ended_is_not_replaced(node_dir: Path) -> None:
    keeper = ZygoteKeeper(node_dir)
    last = keeper.process
    keeper.end()
    with pytest.raises(zygote.ZygoteUnavailable):
        keeper.start_attempt(node_dir / "attempts" / "t3")
    assert keeper.process is last
    assert last.poll() is not None


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


@pytest.mark.skipif(bool(why_no_network()), reason=why_no_network())
def test_one_that_follows_keeps_networks_ready_too(node_dir: Path) -> None:
    network = Network(policy="internet", reach="full", installation=installation_tag(str(node_dir)))

    def ready() -> set[str]:
        prefix = interface_prefix(network.installation)
        return {name for _, name in if_nameindex() if name.startswith(prefix)}

    keeper = ZygoteKeeper(node_dir)
    try:
        keeper.keep_warm(network, [8123])
        first = eventually(lambda: found if len(found := ready()) == SIZE else None, "the first one's networks")
        keeper.replace(keeper.process)
        eventually(lambda: len(ready() - first) == SIZE and not ready() & first, "the networks of the second alone")
    finally:
        keeper.end()
    eventually(lambda: not ready(), "the end of the networks")
