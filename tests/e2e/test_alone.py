"""One service, started by hand: what `up` writes down is all that it needs."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.platform import ROOT, Platform

pytestmark = [pytest.mark.e2e, pytest.mark.full]


def start_by_hand(home: Path, service: str, log: Path) -> subprocess.Popen[bytes]:
    """As a person would: `set -a; . <home>/run/environment; python -m services NAME`, with nothing else."""
    python = shlex.quote(sys.executable)
    script = f"set -a; . {shlex.quote(str(home))}/run/environment; exec {python} -m services {service}"
    with log.open("wb") as output:
        return subprocess.Popen(
            ["/bin/sh", "-c", script], cwd=ROOT, env={"PATH": os.defpath}, stdout=output, stderr=output
        )


@pytest.mark.parametrize("service", ["scheduler", "gateway"])
def test_a_service_started_alone_takes_the_place_of_the_supervised_one(
    platform: Platform, tmp_path: Path, service: str
) -> None:
    """The supervisor is paused meanwhile, as it would start its own again."""
    supervisor = int((platform.home / "run" / "supervisor.lock").read_text())
    os.kill(supervisor, signal.SIGSTOP)
    alone = None
    try:
        platform.kill(service)
        alone = start_by_hand(platform.home, service, tmp_path / "alone.log")
        with platform.client(patience_s=30) as client:
            deadline = time.monotonic() + 30
            while not all(found.ready for found in client.status().services):
                assert alone.poll() is None, (tmp_path / "alone.log").read_text()[-2000:]
                assert time.monotonic() < deadline, client.status().services
                time.sleep(0.2)
            shown = {found.name: found for found in client.status().services}
        assert shown[service].uptime_s < 35
    finally:
        if alone:
            alone.terminate()
            assert alone.wait(20) == 0
        os.kill(supervisor, signal.SIGCONT)
    with platform.client(patience_s=30) as client:
        deadline = time.monotonic() + 30
        while not all(found.ready for found in client.status().services):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_the_environment_file_is_private_and_survives_the_shell(platform: Platform) -> None:
    file = platform.home / "run" / "environment"
    assert file.stat().st_mode & 0o777 == 0o600
    script = f"set -a; . {shlex.quote(str(file))}; env"
    told = subprocess.run(
        ["/bin/sh", "-c", script], env={}, capture_output=True, text=True, check=True, timeout=10
    ).stdout
    names = dict(line.partition("=")[::2] for line in told.splitlines())
    assert names["NABLA_HOME"] == str(platform.home)
    assert names["NABLA_GPUS"] == "2", "what `up` was given by its environment is there, too"
    assert {"NABLA_NATS_URL", "NABLA_S3_ENDPOINT", "NABLA_FRONT_DOOR", "RAY_AUTH_TOKEN_PATH"} <= set(names)
