"""How much later a command begins in a container of ours than in one of podman's own: the same image, in turn.

`python -m tests.bench.containers`, on a machine that does nothing else.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass

from services.executor.adapters.runtimes.engine import Engine
from services.executor.adapters.runtimes.podman import podman_environment
from tests.bench.measures import Row, promise
from tests.integration.executor.attempts import running_node
from tests.integration.executor.runtimes import podman, podman_kit, why_no_podman

ROUNDS = 20
MOST_TIMES = 1.2
NOW = ["date", "+%s.%N"]
# What this machine's limits allow; ours sets none.
LIMITS = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]


@dataclass(frozen=True)
class ContainerStart:
    """Seconds from the order to the command's first act."""

    ours_p50_s: float
    podman_p50_s: float
    ours_least_s: float
    podman_least_s: float

    @property
    def ratio(self) -> float:
        return self.ours_p50_s / self.podman_p50_s


def container_start(rounds: int = ROUNDS) -> ContainerStart:
    engine = podman()
    assert isinstance(engine, Engine), engine
    ours, theirs = [], []
    with running_node() as node, podman_kit() as kit:
        image = kit.fields["image"].image
        command = [*engine.command, "run", "--rm", "--init", "--network=none", "--cap-drop=all", *LIMITS, image, *NOW]
        for _ in range(rounds):
            begun = time.time()
            ours.append(float(node.run(NOW, **kit.fields).lines("o")[0]) - begun)
            begun = time.time()
            done = subprocess.run(command, env=podman_environment(), capture_output=True, text=True, check=True)
            theirs.append(float(done.stdout) - begun)
    return ContainerStart(statistics.median(ours), statistics.median(theirs), min(ours), min(theirs))


def beside_podman() -> Row:
    if why := why_no_podman():
        return {"skipped": why, "promises": []}
    found = container_start()
    holds = found.ratio <= MOST_TIMES
    return {
        **asdict(found),
        "ratio": round(found.ratio, 3),
        "promises": [
            promise(f"a container begins within {MOST_TIMES:g} times podman run's", f"{found.ratio:.2f} times", holds)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(beside_podman(), indent=2))
