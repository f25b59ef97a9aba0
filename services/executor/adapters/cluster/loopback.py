"""Keeps a Ray head of one machine on loopback, and lets a driver reach it there.

Ray 2.60 turns 127.0.0.1 into the machine's outer address, "to a remotely reachable IP", and then listens on all
interfaces. Given 127.0.0.1 as it is, its servers listen on loopback alone. There is no setting for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


def keep_loopback() -> None:
    """Makes Ray, in this process, take 127.0.0.1 for what it says. Addresses of other machines are not touched."""
    from ray._private import services

    services.resolve_ip_for_localhost = lambda host: host


def main() -> int:
    """The `ray` command, kept on loopback: `python -m services.executor.adapters.cluster.loopback start --head ...`."""
    keep_loopback()
    from ray.scripts import scripts

    run: Callable[[], None] = scripts.main
    run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
