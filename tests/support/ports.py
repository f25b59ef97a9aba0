"""Free ports, so that two test runs can live side by side."""

from __future__ import annotations

import socket
import time


def free_port() -> int:
    """A TCP port nobody listens on right now, outside of the range of Ray's workers (10002-19999)."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if not 10_002 <= port <= 19_999:
            return port


def wait_for_port(port: int, timeout_s: float = 20.0) -> None:
    """Returns when something listens; raises TimeoutError when nothing does in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port} after {timeout_s} s")
