"""What every runtime gives a job besides what its shim promises (test_shim): folders, a user and ways out.
Nothing of it is left behind.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from services.executor.adapters.attempts import processes
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, Bind, FrontDoor
from services.executor.adapters.attempts.launch import end_strays
from services.executor.adapters.runtimes import cgroup
from services.executor.domain.network import Network, interface_name
from tests.integration.executor.attempts import JOB_UID, Node, eventually, processes_of, running_node, said, started
from tests.integration.executor.netspaces import why_no_network
from tests.integration.executor.runtimes import RUNTIMES, Kit, kit, podman, why_not
from tests.integration.executor.test_sandbox import ESCAPES

pytestmark = pytest.mark.integration

SERVE = (
    "import http.server, os\n"
    "class H(http.server.BaseHTTPRequestHandler):\n"
    "    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b'inside')\n"
    "    def log_message(self, *_): pass\n"
    "s = http.server.HTTPServer(('127.0.0.1', int(os.environ['P'])), H)\n"
    "print('ready', flush=True)\n"
    "s.serve_forever()\n"
)
ASK = (
    "import socket, sys, urllib.request\n"
    "print(urllib.request.urlopen('http://127.0.0.1:7070').read().decode())\n"
    "for address in [('127.0.0.1', int(sys.argv[1])), ('127.0.0.1', int(sys.argv[2])), ('1.1.1.1', 53)]:\n"
    "    try: socket.create_connection(address, 2); print('open')\n"
    "    except OSError: print('closed')\n"
)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


# As in test_shim, all of an unpacked image is for a long run; test_images runs one in the short.
PARAMS = [pytest.param(name, marks=[pytest.mark.full] if "image" in name else []) for name in RUNTIMES]


@pytest.fixture(scope="module", params=PARAMS)
def runtime(request: pytest.FixtureRequest) -> Iterator[Kit]:
    if reason := why_not(request.param):
        pytest.skip(reason)
    with kit(request.param) as made:
        yield made


def residue(folder: AttemptFolder) -> list[str]:
    """What is left on the node of an attempt that is over, its folder apart."""
    left = [f"process {pid}" for pid in processes_of(folder)]
    left += [str(path) for path in cgroup.folders_of(folder.path.name) if path.exists()]
    tag = folder.path.name
    left += [line for line in Path("/proc/self/mounts").read_text().splitlines() if tag in line]
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            line = Path("/proc", name, "cmdline").read_bytes()
            if tag.encode() in line and b"pytest" not in line:
                left.append(f"process {name}: {line!r}")
    return left


def test_folders_and_environment_are_where_they_are_promised(node: Node, runtime: Kit) -> None:
    storage = node.path / f"storage-{runtime.name.replace(' ', '-')}"
    storage.mkdir()
    storage.chmod(0o777)
    (node.path / "sdk").mkdir(exist_ok=True)
    (node.path / "sdk" / "given").write_text("sdk")
    ended = node.run(
        'touch here "$NABLA_ARTIFACTS/a" "$NABLA_STORAGE/s" "$HOME/h" "$TMPDIR/t"; ls "$NABLA_WORKSPACE";'
        'echo "$NABLA_ISOLATION $LINE2 $CUDA_VISIBLE_DEVICES"; df -k --output=size /dev/shm | tail -n 1',
        **runtime.fields,
        binds_rw=[Bind(str(storage), "/storage")],
        binds_ro=[Bind(str(node.path / "sdk"), "/opt/given")] if runtime.is_walled else [],
        env={"LINE2": "given"},
        gpu_indices=[801, 802],
    )
    listed, line, shared_kib = ended.lines("o")
    assert (ended.code, listed, line) == (0, "here", f"{runtime.isolation} given 801,802"), ended.text
    assert int(shared_kib) > 100_000  # workers of a data loader need more than an engine's 64 MB
    owner = JOB_UID if JOB_UID is not None else os.geteuid()
    for path in (ended.folder.artifacts / "a", storage / "s", ended.folder.tmp / "home" / "h", ended.folder.tmp / "t"):
        assert path.stat().st_uid == owner


def test_what_is_given_to_read_stays_as_it_is(node: Node, runtime: Kit) -> None:
    if not runtime.is_walled:
        pytest.skip("without walls there are no mounts")
    given = node.path / "read-only"
    given.mkdir(exist_ok=True)
    given.chmod(0o777)
    (given / "file").write_text("given")
    ended = node.run("cat /data/file; touch /data/new", **runtime.fields, binds_ro=[Bind(str(given), "/data")])
    assert (ended.code, ended.lines("o")) == (1, ["given"])
    assert [path.name for path in given.iterdir()] == ["file"]


def test_nobody_is_root_and_nothing_makes_a_job_so(node: Node, runtime: Kit) -> None:
    ended = node.run("id -u; grep -E 'CapEff|NoNewPrivs' /proc/self/status | tr -d '\\n\\t'", **runtime.fields)
    uid, rights = ended.lines("o")
    assert int(uid) != 0
    assert rights == f"CapEff:{'0' * 16}NoNewPrivs:1"


def test_ways_out_are_closed(node: Node, runtime: Kit) -> None:
    if not runtime.is_walled:
        pytest.skip("there are no walls")
    ended = node.run(["python3", "-c", ESCAPES], **runtime.fields)
    outcomes = dict(line.rsplit(" ", 1) for line in ended.lines("o"))
    assert len(outcomes) == 12, ended.text
    assert "open" not in outcomes.values(), outcomes


def test_front_door_is_reached_and_the_node_is_not(node: Node, runtime: Kit) -> None:
    if not runtime.is_walled:
        pytest.skip("without walls the node's network is the job's")
    with answering("front door") as port, socket.create_server(("127.0.0.1", 0)) as other:
        words = ["python3", "-c", ASK, str(port), str(other.getsockname()[1])]
        ended = node.run(words, **runtime.fields, front_door=[FrontDoor(7070, "127.0.0.1", port)])
    assert ended.lines("o") == ["front door", "closed", "closed", "closed"], ended.text


def test_a_network_that_the_node_opened_is_joined_with_its_names_and_left(node: Node, runtime: Kit) -> None:
    if not runtime.is_walled:
        pytest.skip("without walls the node's network is the job's")
    if why_no_network(as_root=os.geteuid() == 0):
        pytest.skip(why_no_network(as_root=os.geteuid() == 0))
    network = Network(policy="internet", reach="full", installation="test", subnet="100.97.0.0/16")
    with answering("front door") as port:
        words = ["python3", "-c", ASK, str(port), str(port)]
        asked = node.run(words, **runtime.fields, network=network, front_door=[FrontDoor(7070, "127.0.0.1", port)])
        command = "grep -c eth0 /proc/net/dev; grep -m 1 nameserver /etc/resolv.conf; head -n 1 /etc/hosts"
        seen = node.run(command, **runtime.fields, network=network)
    assert asked.lines("o")[:3] == ["front door", "closed", "closed"], asked.text
    name = seen.folder.path.name
    # Of an unpacked image only files that it has are covered, and this one has neither.
    told = [] if "over" in runtime.name else ["nameserver 127.0.0.1", f"127.0.0.1 localhost {name}"]
    assert seen.lines("o") == ["1", *told], seen.text
    left = {interface_name(network, ended.folder.path.name) for ended in (asked, seen)}
    eventually(lambda: not left & set(os.listdir("/sys/class/net")), "the end of the sandboxes' interfaces")


def test_a_port_of_the_job_is_reached_from_the_node(node: Node, runtime: Kit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = node.start(["python3", "-c", SERVE], **runtime.fields, expose_ports=[port], env={"P": str(port)})
    eventually(lambda: said(folder, "ready"), "the job's server")
    at = started(folder).ports[port]
    with socket.create_connection(("127.0.0.1", at), 10) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert connection.makefile("rb").read().endswith(b"inside")
    folder.request_stop(0, "over")
    node.end_of(folder)


@pytest.mark.parametrize("victim", ["shim", "shim's child", "both"])
def test_whatever_is_killed_nothing_is_left(node: Node, runtime: Kit, victim: str) -> None:
    folder = node.start("(setsid sleep 1000 &); echo ready; sleep 1000", **runtime.fields)
    eventually(lambda: said(folder, "ready"), "the job's first line")
    shim = folder.read_shim()
    assert shim
    child = processes.descendants(shim.pid)[0]
    for pid in {"shim": [shim.pid], "shim's child": [child], "both": [child, shim.pid]}[victim]:
        os.kill(pid, 9)
    if victim == "shim's child":
        assert node.end_of(folder).code == 137
    elif victim == "shim" or runtime.isolation == "bwrap":
        eventually(lambda: not processes_of(folder), "the end of the job's processes")
    # Of a shim that was killed the node agent takes what is left; where its child was too, all.
    end_strays(folder)
    eventually(lambda: not residue(folder), "the end of all that was made for it")
    assert containers_of(folder) == []


def containers_of(folder: AttemptFolder) -> list[str]:
    engine = podman()
    command = getattr(engine, "command", None)
    if not command:
        return []
    words = [*command, "ps", "--all", "--filter", f"name={folder.path.name}$", "--format", "{{.Names}}"]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split()


@contextlib.contextmanager
def answering(text: str) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
