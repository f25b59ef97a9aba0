"""Into a running job through its node's door: with tickets alone, as the job's own user with the job's own rights."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nabla.http import Http, Response
from nabla.tunnel import Tunnel
from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.adapters.doors import door_tickets as tickets_module
from services.executor.adapters.doors.door import PROTOCOL, Config, start_door
from services.executor.adapters.doors.door_tickets import FernetTickets
from services.executor.domain.doors import DoorTicket
from tests.integration.executor.attempts import (
    Node,
    eventually,
    processes_of,
    running_node,
    said,
    started,
)
from tests.integration.executor.runtimes import RUNTIMES, Kit, kit, why_not

pytestmark = pytest.mark.integration

KEY = bytes(range(32))
PROXY = """
import sys
from nabla.http import Http
from nabla.tunnel import Tunnel, carry
tunnel = Http().upgrade(sys.argv[1], {"Authorization": "Ticket " + sys.argv[2]}, "nabla-tunnel")
if not isinstance(tunnel, Tunnel):
    sys.exit(tunnel.read().decode())
carry(tunnel, 0, 1)
"""
SERVER = """
from http.server import HTTPServer, SimpleHTTPRequestHandler
HTTPServer(("127.0.0.1", 8000), SimpleHTTPRequestHandler).serve_forever()
"""


class Door:
    """A node's door, and clients of it."""

    def __init__(self, node: Node, folder: Path) -> None:
        self.node = node
        self.folder = folder
        self.tickets = FernetTickets(KEY)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/n/here"
        self.restart()
        self.key = folder / "id"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True)

    def restart(self) -> None:
        self.process = start_door(self._listener, Config(KEY, self.node.path / "attempts", self.folder / "used"))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self._listener.close()

    def ticket(self, folder: AttemptFolder, kind: str, port: int = 0) -> str:
        public = self.key.with_suffix(".pub").read_text()
        return self.tickets.issue(DoorTicket(folder.path.name, kind, port, public))

    def enter(self, ticket: str) -> Tunnel | Response:
        return Http().upgrade(self.url, {"Authorization": f"Ticket {ticket}"}, PROTOCOL)

    def options(self, folder: AttemptFolder) -> list[str]:
        hosts = self.folder / "hosts"
        hosts.write_text(f"{folder.path.name} {self.tickets.host_key_line(folder.path.name)}\n")
        proxy = self.folder / "proxy.py"
        proxy.write_text(PROXY)
        command = f"{sys.executable} {proxy} {self.url} {self.ticket(folder, 'ssh')}"
        said = [f"ProxyCommand={command}", f"UserKnownHostsFile={hosts}", "StrictHostKeyChecking=yes"]
        said += [f"IdentityFile={self.key}", "IdentitiesOnly=yes", "BatchMode=yes", "LogLevel=ERROR"]
        return ["-F", "none", *(word for each in said for word in ("-o", each))]

    def ssh(
        self, folder: AttemptFolder, *words: str, input: bytes | None = None
    ) -> "subprocess.CompletedProcess[bytes]":
        return run_client(["ssh", *self.options(folder), f"nabla@{folder.path.name}", *words], input)


def client_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path("libs/client").absolute())}


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Iterator[Kit]:
    if reason := why_not(request.param):
        pytest.skip(reason)
    with kit(request.param) as made:
        yield made


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    if not shutil.which("ssh"):
        pytest.skip("no ssh here: apt-get install openssh-client")
    with running_node() as node:
        opened = Door(node, tmp_path_factory.mktemp("door"))
        try:
            yield opened
        finally:
            opened.close()


@pytest.fixture(scope="module")
def job(door: Door, runtime: Kit) -> AttemptFolder:
    """A job that goes on, with a web server in it."""
    folder = door.node.start(["python3", "-c", SERVER], **runtime.fields, env={"FLAVOUR": "vanilla"})
    started(folder)
    return folder


def test_a_command_runs_as_the_job_does(door: Door, job: AttemptFolder, runtime: Kit) -> None:
    done = door.ssh(job, "id -u; pwd; echo $FLAVOUR $NABLA_ATTEMPT_ID; ls /workspace >&2; exit 7")
    user, folder, variables = done.stdout.decode().splitlines()
    spec = job.read_spec()
    assert done.returncode == 7, done
    assert user == ("1000" if runtime.isolation == "bwrap" else str(spec.run_as_uid or os.geteuid()))
    assert folder == ("/workspace" if runtime.is_walled else str(job.workspace))
    assert variables == f"vanilla {job.path.name}"


def test_streams_pass_whole_in_both_directions(door: Door, job: AttemptFolder) -> None:
    data = os.urandom(8_000_000)
    done = door.ssh(job, "cat; echo aside >&2", input=data)
    assert done.returncode == 0
    assert len(done.stdout) == len(data)
    assert done.stdout == data
    assert done.stderr == b"aside\n"


def test_a_terminal_is_a_real_one(door: Door, job: AttemptFolder) -> None:
    done = door.ssh(job, "-tt", "stty size; tty; exit 3")
    assert done.returncode == 3, done
    assert b"/dev/pts/" in done.stdout


def test_a_shell_speaks_to_its_client(door: Door, job: AttemptFolder) -> None:
    done = door.ssh(job, "-tt", input=b"echo $((6 * 7))\nexit 5\n")
    assert done.returncode == 5
    assert b"42\r\n" in done.stdout


def test_files_are_copied_by_scp_sftp_and_rsync(door: Door, job: AttemptFolder, runtime: Kit, tmp_path: Path) -> None:
    source, back = tmp_path / "in.bin", tmp_path / "back.bin"
    source.write_bytes(os.urandom(300_000))
    inside = "/workspace" if runtime.is_walled else str(job.workspace)
    there = f"nabla@{job.path.name}:{inside}"
    run(["scp", *door.options(job), str(source), f"{there}/scp.bin"])
    run(["scp", *door.options(job), f"{there}/scp.bin", str(back)])
    assert back.read_bytes() == source.read_bytes()
    run(
        ["sftp", *door.options(job), "-b", "-", f"nabla@{job.path.name}"],
        input=f"put {source} {inside}/sftp.bin\n".encode(),
    )
    assert (job.workspace / "sftp.bin").read_bytes() == source.read_bytes()
    assert (job.workspace / "sftp.bin").stat().st_uid == (job.read_spec().run_as_uid or os.geteuid())
    # Of the job's own system, as everything in there.
    if shutil.which("rsync") and door.ssh(job, "command -v rsync").returncode == 0:
        shell = " ".join(f"'{word}'" for word in ("ssh", *door.options(job)))
        run(["rsync", "-e", shell, str(source), f"{there}/rsync.bin"])
        assert (job.workspace / "rsync.bin").read_bytes() == source.read_bytes()


def test_a_port_of_the_job_is_reached(door: Door, job: AttemptFolder) -> None:
    (job.workspace / "hello.txt").write_text("from inside")
    answer = eventually(lambda: web_answer(door, job), "the job's web server")
    assert answer.endswith(b"from inside")


def test_ssh_forwards_to_ports_of_the_job_alone(door: Door, job: AttemptFolder) -> None:
    (job.workspace / "hello.txt").write_text("from inside")
    eventually(lambda: web_answer(door, job), "the job's web server")
    request = b"GET /hello.txt HTTP/1.0\r\n\r\n"
    assert door.ssh(job, "-W", "127.0.0.1:8000", input=request).stdout.endswith(b"from inside")
    assert door.ssh(job, "-W", "192.0.2.1:80", input=request).returncode == 255


@pytest.mark.parametrize("first", ["server", "client"])
def test_a_forwarded_connection_is_over_when_both_ends_have_said_all(
    door: Door, job: AttemptFolder, first: str
) -> None:
    (job.workspace / "hello.txt").write_text("from inside")
    eventually(lambda: web_answer(door, job), "the job's web server")
    command = ["ssh", *door.options(job), "-W", "127.0.0.1:8000", f"nabla@{job.path.name}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=client_environment()
    ) as client:
        assert client.stdin
        assert client.stdout
        try:
            client.stdin.write(b"GET /hello.txt HTTP/1.0\r\n\r\n")
            if first == "client":
                client.stdin.close()
                answer = client.stdout.read()
            else:
                client.stdin.flush()
                answer = client.stdout.read()
                client.stdin.close()
            assert answer.endswith(b"from inside")
            assert client.wait(30) == 0
        finally:
            client.kill()


def test_a_port_where_nothing_listens_is_told(door: Door, job: AttemptFolder) -> None:
    answer = door.enter(door.ticket(job, "tcp", 9))
    assert isinstance(answer, Response)
    assert answer.status == 502
    assert b"port 9" in answer.read()


@pytest.mark.parametrize("spoil", ["nothing", "garbage", "changed", "other key", "used"])
def test_the_door_stays_shut_without_a_good_ticket(door: Door, job: AttemptFolder, spoil: str) -> None:
    good = door.ticket(job, "tcp", 8000)
    other = FernetTickets(bytes(32)).issue(DoorTicket(job.path.name, "tcp", 8000))
    if spoil == "used":
        first = door.enter(good)
        first.close()
    bad = {"nothing": "", "garbage": "x" * 9000, "changed": good[:-9] + "AAAAAAAA=", "other key": other, "used": good}[
        spoil
    ]
    answer = door.enter(bad)
    assert isinstance(answer, Response), "let in"
    assert answer.status in (401, 403)
    answer.close()


def test_a_ticket_is_too_old_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    issued = FernetTickets(KEY).issue(DoorTicket("at1", "ssh"))
    late = time.time() + tickets_module.HOLDS_S + 2
    with pytest.raises(tickets_module.TicketRefused, match="older than a minute"):
        FernetTickets(KEY, clock=lambda: late).read(issued)


def test_no_other_key_signs_in(door: Door, job: AttemptFolder, tmp_path: Path) -> None:
    options = door.options(job)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    options = [f"IdentityFile={tmp_path / 'other'}" if word.startswith("IdentityFile") else word for word in options]
    command = ["ssh", *options, f"nabla@{job.path.name}", "true"]
    done = subprocess.run(command, capture_output=True, timeout=60, env=client_environment(), check=False)
    assert done.returncode == 255
    assert b"Permission denied" in done.stderr


def test_whoever_entered_has_no_more_rights_than_the_job(door: Door, job: AttemptFolder, runtime: Kit) -> None:
    look = "grep -E '^(CapEff|CapPrm|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status; cat /proc/1/comm"
    entered = dict(line.split(":\t") for line in door.ssh(job, look).stdout.decode().splitlines() if ":" in line)
    assert entered["NoNewPrivs"] == "1"
    assert int(entered["CapEff"], 16) == 0
    assert int(entered["CapPrm"], 16) == 0
    if runtime.is_walled:
        assert entered["Seccomp"] == "2"
        assert door.ssh(job, "unshare --user true").returncode != 0
        assert door.ssh(job, "cat /etc/shadow").returncode != 0


def test_what_a_client_started_ends_when_it_leaves(door: Door, job: AttemptFolder) -> None:
    command = ["ssh", *door.options(job), "-tt", f"nabla@{job.path.name}", "echo here; sleep 1000"]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=client_environment())
    assert client.stdout
    assert client.stdout.readline().strip() == b"here"
    before = len(processes_of(job))
    client.kill()
    client.wait()
    client.stdout.close()
    assert client.stdin
    client.stdin.close()
    eventually(lambda: len(processes_of(job)) < before or None, "the end of the client's command")
    assert job.read_exit() is None


def test_a_session_ends_with_its_job(door: Door, runtime: Kit) -> None:
    folder = door.node.start("echo up; sleep 1000", **runtime.fields)
    eventually(lambda: said(folder, "up") or None, "the job's line")
    command = ["ssh", *door.options(folder), f"nabla@{folder.path.name}", "echo here; sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=client_environment()) as client:
        assert client.stdout
        assert client.stdout.readline() == b"here\n"
        folder.request_stop(1.0, "enough")
        assert client.wait(30) != 0
    door.node.end_of(folder)
    assert eventually(lambda: not processes_of(folder) or None, "the end of all of the job")


def test_a_job_that_is_over_cannot_be_entered(door: Door, runtime: Kit) -> None:
    ended = door.node.run("true", **runtime.fields)
    answer = door.enter(door.ticket(ended.folder, "tcp", 80))
    assert isinstance(answer, Response)
    assert answer.status == 409
    assert b"the job is over" in answer.read()


def test_sessions_outlive_their_door(door: Door, job: AttemptFolder) -> None:
    command = ["ssh", *door.options(job), f"nabla@{job.path.name}", "echo here; read line; echo got $line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=client_environment()) as client:
        assert client.stdout
        assert client.stdin
        assert client.stdout.readline() == b"here\n"
        door.process.send_signal(signal.SIGKILL)
        door.process.wait()
        door.restart()
        client.stdin.write(b"news\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"got news\n"
    assert door.ssh(job, "echo again").stdout == b"again\n"


def web_answer(door: Door, job: AttemptFolder) -> bytes | None:
    tunnel = door.enter(door.ticket(job, "tcp", 8000))
    if not isinstance(tunnel, Tunnel):
        tunnel.close()
        return None
    with contextlib.closing(tunnel):
        tunnel.write(b"GET /hello.txt HTTP/1.0\r\n\r\n")
        return b"".join(iter(tunnel.read, b""))


def run(command: list[str], input: bytes | None = None) -> None:
    done = run_client(command, input)
    assert done.returncode == 0, done.stderr.decode()


def run_client(command: list[str], input: bytes | None = None) -> "subprocess.CompletedProcess[bytes]":
    given = input or b""
    return subprocess.run(command, input=given, capture_output=True, timeout=60, env=client_environment(), check=False)
