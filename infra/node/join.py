"""Makes this machine a node of a Nabla cluster. Served by the cluster's front door; needs Python and nothing else.

`nabla node token` prints the command that fetches and runs it. Everything comes from that front door but the packages,
whose files are named by hash in the code that it sends. Everything goes into one folder, which `nabla node leave`
removes. Old Pythons can read this, to be told their age.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request

# Filled in by the front door: url, ticket, and python and ray, the versions of the cluster.
SETTINGS: dict[str, str] = {}

ANSWER_S = 60
START_S = 90


class CannotJoin(Exception):
    """What happened, why, and what to do."""


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    check_python()
    home = os.path.abspath(os.path.expanduser(options.home))
    refuse_second(home)
    os.makedirs(home, mode=0o755, exist_ok=True)
    code = os.path.join(home, "code")
    say(f"Fetching the node's code from {SETTINGS['url']}")
    unpack(ask("GET", "/nodes/bundle"), code)
    python, jobs = environments(code, options.environment, options.job_environment)
    check_ray(python)
    grant = json.loads(ask("POST", "/nodes/admission", {"hostname": socket.gethostname()}).decode())
    write_private(os.path.join(home, "ray-token"), grant["ray_token"])
    facts = {
        "url": SETTINGS["url"],
        "ray_address": grant["ray_address"],
        "address": options.address or own_address(grant["ray_address"]),
        "python": python,
        "default_environment": jobs,
        "storage": os.path.abspath(options.storage) if options.storage else os.path.join(home, "storage"),
        "cpus": options.cpus,
        "gpus": options.gpus,
    }
    write_private(os.path.join(home, "node.json"), json.dumps(facts, indent=2))
    start(home, code, python)
    say("This machine is a node now: `nabla nodes list` shows it within seconds.")
    say(f"To leave the cluster again: {python} {os.path.join(code, 'infra/node/node.py')} leave {home}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Make this machine a node of the cluster at {SETTINGS['url']}.")
    home = "/var/lib/nabla-node" if os.geteuid() == 0 else "~/.nabla-node"
    parser.add_argument("--home", default=home, help="where everything goes (default: %(default)s)")
    parser.add_argument("--address", default="", help="how other nodes reach this machine (default: found)")
    parser.add_argument("--cpus", type=int, default=0, help="CPUs for jobs (default: all)")
    parser.add_argument("--gpus", type=int, default=-1, help="GPUs for jobs (default: all)")
    parser.add_argument("--storage", default="", help="the folder of /storage, such as a shared mount")
    parser.add_argument("--environment", default="", help="a virtual environment with Ray in it, to use instead")
    parser.add_argument("--job-environment", default="", help="that of jobs, beside it (default: the same)")
    return parser.parse_args(arguments)


def check_python() -> None:
    wanted = SETTINGS["python"]
    found = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if found == wanted:
        return
    there = shutil.which("python" + wanted)
    remedy = f"Begin the command with {there}." if there else f"Install Python {wanted} here first."
    raise CannotJoin(f"The cluster runs Python {wanted}, and this is {found}: Ray needs one on all nodes. {remedy}")


def refuse_second(home: str) -> None:
    if os.path.exists(os.path.join(home, "node.json")):
        raise CannotJoin(f"{home} is a node's folder already: `nabla node leave` first, or give another --home.")


def ask(method: str, path: str, body: dict[str, str] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(SETTINGS["url"] + "/api/v1" + path, data=data, method=method)
    request.add_header("Authorization", "Bearer " + SETTINGS["ticket"])
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            read: bytes = answer.read()
            return read
    except urllib.error.HTTPError as error:
        raise CannotJoin(f"{SETTINGS['url']} says: {told_by(error)}") from None
    except OSError as error:
        raise CannotJoin(f"{SETTINGS['url']} does not answer: {error}. Is it reachable from here?") from None


def told_by(error: urllib.error.HTTPError) -> str:
    try:
        problem = json.loads(error.read().decode())
        return f"{problem['detail']} {problem['remedy']}"
    except (ValueError, KeyError):
        return f"{error.code} {error.reason}"


def unpack(archive: bytes, code: str) -> None:
    """Regular files alone, below the folder alone; what an earlier try left is replaced, but its environments."""
    for name in os.listdir(code) if os.path.isdir(code) else []:
        if not name.startswith(".venv"):
            path = os.path.join(code, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as packed:
        for member in packed.getmembers():
            parts = member.name.split("/")
            content = packed.extractfile(member) if member.isfile() else None
            if content is None or member.name.startswith("/") or ".." in parts:
                raise CannotJoin(f"The code that came holds {member.name!r}, which is no file of ours.")
            target = os.path.join(code, *parts)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as file:
                shutil.copyfileobj(content, file)


def environments(code: str, given: str, of_jobs: str) -> tuple[str, str]:
    """The platform's Python and the environment of jobs, installed from the locks unless one was given."""
    if given:
        return os.path.join(os.path.abspath(given), "bin/python"), os.path.abspath(of_jobs or given)
    say("Installing what the cluster runs, each file checked by its hash; this takes minutes the first time")
    call = "import sys; sys.path.insert(0, 'infra'); import setup; setup.install('platform', 'serving')"
    done = subprocess.run([sys.executable, "-c", call], cwd=code, check=False)
    if done.returncode:
        raise CannotJoin("The packages could not be installed, as said above. The ticket is still good: try again.")
    return os.path.join(code, ".venv/bin/python"), os.path.join(code, ".venv-serving")


def check_ray(python: str) -> None:
    call = "import importlib.metadata as m, sys; print('%d.%d' % sys.version_info[:2], m.version('ray'))"
    try:
        done = subprocess.run([python, "-c", call], capture_output=True, timeout=ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotJoin(f"{python} cannot be used: {error}") from None
    found, wanted = done.stdout.decode().split(), [SETTINGS["python"], SETTINGS["ray"]]
    if found != wanted:
        has = f"Python {found[0]} and Ray {found[1]}" if found else "no Ray"
        raise CannotJoin(f"The cluster runs Python {wanted[0]} and Ray {wanted[1]}; {python} has {has}.")


def own_address(ray_address: str) -> str:
    """The address from which this machine reaches the cluster's head."""
    host, _, port = ray_address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), 10) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        told = f"Ray's head at {ray_address} does not answer: {error}. Nodes must reach each other on all ports."
        raise CannotJoin(told) from None


def start(home: str, code: str, python: str) -> None:
    """Starts the keeper, which starts Ray here, and again when it ends; returns when Ray is up."""
    log_path = os.path.join(home, "node.log")
    command = [python, os.path.join(code, "infra/node/node.py"), "keep", home]
    with open(log_path, "ab") as log:
        nothing = subprocess.DEVNULL
        keeper = subprocess.Popen(command, cwd="/", stdin=nothing, stdout=log, stderr=log, start_new_session=True)
    deadline = time.time() + START_S
    while not os.path.exists(os.path.join(home, "joined")):
        if keeper.poll() is not None or time.time() > deadline:
            keeper.terminate()
            os.unlink(os.path.join(home, "node.json"))
            with open(log_path, errors="replace") as file:
                tail = "\n  ".join(file.read().splitlines()[-12:])
            raise CannotJoin(f"Ray did not start here. Ask for a new ticket when this is mended:\n  {tail}")
        time.sleep(0.2)


def write_private(path: str, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CannotJoin as error:
        sys.exit(f"nabla: {error}")
