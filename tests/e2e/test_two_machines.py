"""Jobs on two machines: what one opens on the second answers through the front door, and a gang over both meets."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local import demo
from tests.e2e.test_joining import eventually
from tests.support.links import Link, linked_namespace, why_no_links
from tests.support.platform import Platform, running_platform

WHY_NOT = why_no_links()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.full,
    pytest.mark.timeout(500),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
# What torch's own rendezvous needs of the network: rank 0 listens, the others find it, and it finds them by an address.
MEET = """
import os, socket, time
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if rank == 0:
    with socket.create_server(("0.0.0.0", where[1])) as listener:
        met = []
        while len(met) < size - 1:
            connection, _ = listener.accept()
            name, port, node = connection.recv(200).decode().split()
            with socket.create_connection((name, int(port)), 20) as back:
                back.sendall(b"welcome")
            met.append(node)
    print("met", len(met), "on", len({os.environ["NABLA_NODE_ID"], *met}), "nodes", flush=True)
else:
    with socket.create_server(("0.0.0.0", 0)) as own:
        for _ in range(300):
            try:
                master = socket.create_connection(where, 2)
                break
            except OSError:
                time.sleep(0.1)
        address = master.getsockname()[0]
        master.sendall(f"{address} {own.getsockname()[1]} {os.environ['NABLA_NODE_ID']}".encode())
        print("heard", own.accept()[0].recv(20).decode(), flush=True)
"""
SERVE = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8000, bind='127.0.0.1')"


@pytest.fixture(scope="module")
def two() -> Iterator[Platform]:
    """The platform here with two CPUs, and a machine at the other end of a link with one, and with GPUs."""
    with (
        linked_namespace() as link,
        tempfile.TemporaryDirectory(prefix="nabla-e2e-") as folder,
        running_platform(Path(folder) / "home", host="0.0.0.0", node_address=link.here, gpus="0", cpus="2") as platform,
        joined(platform, link, Path(folder) / "node"),
    ):
        yield platform


@contextlib.contextmanager
def joined(platform: Platform, link: Link, home: Path) -> Iterator[None]:
    command = platform.command("node", "token").stdout.strip()
    environments = ["--environment", sys.prefix, "--job-environment", str(demo.CHECKOUT / ".venv-serving")]
    options = shlex.join(["--home", str(home), *environments, "--gpus", "4", "--cpus", "1"])
    path = f"PATH={Path(sys.executable).resolve().parent}:/usr/bin:/bin"
    inside = [*link.inside, "env", "-i", path, "HOME=/root", "sh", "-c", f"{command} {options}"]
    done = subprocess.run(inside, capture_output=True, text=True, timeout=180, check=False, cwd="/")
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        with platform.client() as client:
            eventually(
                lambda: next((n for n in client.nodes.list() if (n.address, n.state) == (link.there, "ready")), None),
                "the node",
            )
        yield
    finally:
        leaving = [sys.executable, str(home / "code/infra/node/node.py"), "leave", str(home), "--now"]
        subprocess.run(leaving, capture_output=True, timeout=90, check=False)


def multinode(platform: Platform, folder: Path, *words: str) -> str:
    """Runs a gang to its end and returns what was said; fails when it did."""
    done = platform.command("experiments", "run", "multinode", *words, cwd=folder, timeout_s=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_opened_port_on_the_second_machine_answers(two: Platform, tmp_path: Path) -> None:
    words = ["run", "--detach", "--json", "--gpus", "1", "--", "python", "-c", SERVE]
    started = two.command(*words, cwd=tmp_path)
    assert started.returncode == 0, started.stdout + started.stderr
    job_id = json.loads(started.stdout)["id"]
    with two.client() as client:
        eventually(lambda: client.jobs.get(job_id).job.state == "running" or None, "the job")  # type: ignore[arg-type]
        nabla = str(Path(sys.executable).parent / "nabla")
        words = [nabla, "jobs", "open", job_id, "--port", "8000", "--local", "0"]
        opened = subprocess.Popen(words, env=two.environment, stdout=subprocess.PIPE, text=True)
        try:
            assert opened.stdout
            url = opened.stdout.readline().strip()
            eventually(lambda: answers(url) or None, "the port")  # type: ignore[arg-type]
        finally:
            opened.terminate()
            opened.wait(20)
            client.jobs.stop(job_id)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return b"Directory listing" in answer.read()
    except OSError:
        return False


def test_a_replica_on_the_second_machine_predicts(two: Platform, tmp_path: Path) -> None:
    with two.client() as client:
        version = demo.registered_model(client, demo.train(client))
        # Only that machine has GPUs.
        words = ["deployments", "create", "far", "--model", version.model_name, "--project", version.project_id]
        deployed = two.command(*words, "--gpus", "1", "--wait", cwd=tmp_path, timeout_s=200)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        assert demo.predict(client, client.deployments.get("far")) >= demo.SHOWN - 1
        assert two.command("deployments", "delete", "far").returncode == 0


def test_the_ranks_of_a_gang_find_each_other_over_both_machines(two: Platform, tmp_path: Path) -> None:
    said = multinode(two, tmp_path, "--workers", "3", "--", "python", "-c", MEET)
    assert "met 2 on 2 nodes" in said
    assert said.count("heard welcome") == 2


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun: apt-get install openmpi-bin")
def test_mpirun_starts_processes_on_both_machines(two: Platform, tmp_path: Path) -> None:
    say = "mpirun sh -c 'echo process $OMPI_COMM_WORLD_RANK of $OMPI_COMM_WORLD_SIZE on $NABLA_NODE_ID'"
    said = multinode(two, tmp_path, "--type", "mpi", "--workers", "2", "--master-command", say)
    lines = [line for line in said.splitlines() if "process " in line and " of " in line]
    assert lines, said
    assert len({line.split()[-1] for line in lines}) == 2, said


def test_one_ranks_failure_ends_the_gang_and_the_next_try_has_the_same_nodes(two: Platform, tmp_path: Path) -> None:
    code = (
        "import os, sys, time; print('try', os.environ['NABLA_ATTEMPT'], os.environ['NABLA_NODE_ID'], flush=True)\n"
        "if os.environ['NABLA_ATTEMPT'] == '1':\n"
        "    sys.exit(3) if os.environ['RANK'] == '2' else time.sleep(300)\n"
    )
    said = multinode(two, tmp_path, "--workers", "3", "--retries", "1", "--", "python", "-c", code)
    tries = [line[line.index("try ") :].split()[1:] for line in said.splitlines() if "try " in line]
    nodes = {number: sorted(node for each, node in tries if each == number) for number in ("1", "2")}
    assert len(nodes["2"]) == 3
    assert nodes["2"] == nodes["1"]
