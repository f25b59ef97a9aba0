"""A real S3 for tests: SeaweedFS from its wheel, on free ports, with one identity and nothing anonymous."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import urllib3

from tests.support.ports import free_port, wait_for_port

BINARY = Path(sys.executable).parent / "weed"
ACCESS_KEY, SECRET_KEY = "tests", "only-for-tests"
PORTS = tuple(f"{part}.{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("port", "port.grpc"))


@dataclass
class Seaweed:
    """A running server; `stop` and `start` keep its ports and data."""

    folder: Path
    ports: dict[str, int]
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports['s3.port']}"

    @property
    def keys_file(self) -> Path:
        return self.folder / "keys.json"

    def start(self) -> None:
        flags = [f"-{name}={port}" for name, port in self.ports.items()]
        command = [
            str(BINARY),
            # Why: it would leave log files in /tmp.
            "-logtostderr=true",
            "server",
            f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-filer",
            "-s3",
            # Why: without an identity file anonymous reads and writes work.
            f"-s3.config={self.folder / 's3.json'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=100",
            *flags,
        ]
        log = (self.folder / "weed.log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for_port(self.ports["s3.port"], 40)
        self._wait_until_it_answers()

    def stop(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(20)
            self.process = None

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            answer = urllib3.request("GET", f"http://{self.address}/", retries=False, timeout=5)
            if answer.status == 403:
                return
            assert answer.status != 200, "anonymous access works"
            time.sleep(0.1)
        raise TimeoutError("SeaweedFS does not answer")


@contextmanager
def running_seaweed(folder: Path) -> Iterator[Seaweed]:
    """A fresh server, stopped at the end whatever happens."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    identity = {
        "name": "storage",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    server = Seaweed(folder, {name: free_port() for name in PORTS})
    server.keys_file.write_text(json.dumps({"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}))
    try:
        server.start()
        yield server
    finally:
        server.stop()
