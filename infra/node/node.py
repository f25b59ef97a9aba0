"""A machine that joined a cluster: keeps Ray running on it, and takes it off again.

node.py keep HOME    in the background, by the one command that joined; and at boot, from a unit of your own
node.py leave HOME   ends Ray and, with --now, the jobs here; removes the folder, but what jobs keep in it
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infra.local import leftovers
from services.executor.adapters.agent.node_agent import stop_all

CODE = Path(__file__).resolve().parents[2]
AGAIN_S = 5.0
LOOK_S = 0.5
ENDING_S = 20.0
JOBS_END_S = 30.0
# What a person may still want, and no cluster has.
KEPT = ("storage", "node/unkept")
# Ray waits a minute for a head that is gone, and a new one does not know the node anyway: with what it takes to start
# again, the node would be out of contact for so long that it had to end its jobs.
WITHOUT_HEAD_S = 20


class NotLeft(Exception):
    """What happened, why, and what to do."""


def keep(home: Path) -> None:
    """Runs Ray here until SIGTERM: a node that was cut off for long is ended by Ray, and comes back under a new id."""
    with _only_one(home):
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        while not stopped.is_set():
            facts = json.loads((home / "node.json").read_text())
            ray = subprocess.Popen(ray_command(facts), env=ray_environment(home, facts), cwd="/")
            while ray.poll() is None and not stopped.wait(LOOK_S):
                if any(is_raylet(pid) for pid in leftovers.processes_of(home)):
                    (home / "joined").touch()
            ray.terminate()
            leftovers.end_processes(home, patience_s=5.0)
            stopped.wait(AGAIN_S)


def is_raylet(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == "raylet"
    return False


def ray_command(facts: dict[str, Any]) -> list[str]:
    command = [facts["python"], "-m", "ray.scripts.scripts", "start", "--block", f"--address={facts['ray_address']}"]
    command += [f"--node-ip-address={facts['address']}", "--labels=nabla-code=1", "--disable-usage-stats"]
    command += ["--include-log-monitor=false"]
    command += [f"--num-cpus={facts['cpus']}"] if facts["cpus"] else []
    command += [f"--num-gpus={facts['gpus']}"] if facts["gpus"] >= 0 else []
    return command


def ray_environment(home: Path, facts: dict[str, Any]) -> dict[str, str]:
    """Ray's workers inherit it, and with it the agent: where its code is, and this node's own folders."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NABLA_", "RAY_", "PYTHON"))}
    return (
        kept
        | leftovers.marked(home)
        | {
            "PYTHONPATH": str(CODE),
            "NABLA_NODE_DIR": str(home / "node"),
            "NABLA_NODE_ENVIRONMENT": facts["default_environment"],
            "NABLA_NODE_CLIENT": str(CODE / "libs" / "client"),
            "NABLA_NODE_STORAGE": facts["storage"],
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(home / "ray-token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(WITHOUT_HEAD_S),
        }
    )


def leave(home: Path, now: bool) -> list[str]:
    """Takes this machine off its cluster; what stays, in words.

    Raises:
        NotLeft: jobs run here, and `now` was not said.
    """
    if not (home / "node.json").exists():
        raise NotLeft(f"{home} is no node's folder: this machine has left already, or joined with another --home.")
    node_dir = home / "node"
    attempts = leftovers.living_attempts(node_dir / "attempts")
    if attempts and not now:
        raise NotLeft(
            f"{len(attempts)} jobs run here. Drain the node first (`nabla nodes drain ID`) and wait for them, or "
            "`nabla node leave --now` ends them."
        )
    _end_keeper(home)
    leftovers.end_processes(home, patience_s=5.0)
    if attempts:
        stop_all(node_dir, 10.0, "its node leaves the cluster")
        _wait_for_end(node_dir)
    leftovers.end_attempts(node_dir / "attempts")
    return _remove(home)


def _wait_for_end(node_dir: Path) -> None:
    deadline = time.monotonic() + JOBS_END_S
    while leftovers.living_attempts(node_dir / "attempts") and time.monotonic() < deadline:
        time.sleep(0.1)


def _remove(home: Path) -> list[str]:
    stays = [home / name for name in KEPT if (home / name).is_dir() and any((home / name).iterdir())]
    for entry in home.iterdir():
        if entry in stays:
            continue
        inner = [stay for stay in stays if entry in stay.parents]
        for each in entry.iterdir() if inner else [entry]:
            if each not in stays:
                shutil.rmtree(each) if each.is_dir() else each.unlink()
    if not stays:
        home.rmdir()
    return [f"kept {path}, which jobs wrote" for path in stays]


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    with (home / "keeper.lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _end_keeper(home: Path) -> None:
    """By the lock that it holds: a number in a file may be somebody else's by now."""
    deadline = time.monotonic() + ENDING_S
    with (home / "keeper.lock").open("a+") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            file.seek(0)
            number = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read()), number)
            time.sleep(0.2)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["keep", "leave"])
    parser.add_argument("home", type=Path)
    parser.add_argument("--now", action="store_true", help="end the jobs that run here")
    options = parser.parse_args(arguments)
    if options.what == "keep":
        keep(options.home.absolute())
        return 0
    try:
        stays = leave(options.home.absolute(), options.now)
    except NotLeft as error:
        sys.exit(f"nabla: {error}")
    for line in stays:
        print(line)
    print("This machine is no node any more.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
