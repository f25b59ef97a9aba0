"""What a shim promises about an attempt, with real processes, in every runtime: the suite that all of them pass."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from services.executor.adapters.attempts import processes, shim, zygote
from services.executor.adapters.attempts.attempt_folder import WAKE, AttemptFolder
from services.executor.adapters.attempts.spool import SpoolReader
from tests.integration.executor.attempts import (
    JOB_UID,
    PATIENCE_S,
    Ended,
    Node,
    eventually,
    log_of,
    processes_of,
    running_node,
    said,
    started,
)
from tests.integration.executor.runtimes import RUNTIMES, Kit, kit, why_not

pytestmark = pytest.mark.integration

MIB = 1024 * 1024
DAEMON = "(setsid sh -c 'sleep 1000' >/dev/null 2>&1 </dev/null & ) ; "  # orphaned, in a session of its own
EAT_MEMORY = "import time\nkept = []\nfor _ in range(1000):\n    kept.append(b'x' * 4 * 2**20); time.sleep(0.002)\n"


KERNEL, SAMPLING = "limits by the kernel", "limits by sampling"
# An unpacked image differs from bwrap's usual root in its mounts alone: all of the suite is for a long run.
PAIRS = [
    *(pytest.param(KERNEL, name, marks=[pytest.mark.full] if "image" in name else []) for name in RUNTIMES),
    (SAMPLING, "bwrap"),
    (SAMPLING, "process"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "runtime" in metafunc.fixturenames:
        metafunc.parametrize(("node", "runtime"), PAIRS, indirect=True, scope="module")
    elif "node" in metafunc.fixturenames:
        metafunc.parametrize("node", (KERNEL, SAMPLING), indirect=True, scope="module")


@pytest.fixture(scope="module")
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with running_node(control_groups=request.param == KERNEL) as node:
        yield node


@pytest.fixture(scope="module")
def runtime(request: pytest.FixtureRequest) -> Iterator[Kit]:
    if reason := why_not(request.param):
        pytest.skip(reason)
    with kit(request.param) as made:
        yield made


def test_exit_code_output_and_times_are_recorded(node: Node, runtime: Kit) -> None:
    before_us = time.time_ns() // 1000
    ended = node.run("echo out; echo err >&2; exit 7", **runtime.fields)
    assert (ended.code, ended.record.signal, ended.record.reason) == (7, None, "exited")
    assert (ended.lines("o"), ended.lines("e")) == (["out"], ["err"])
    assert before_us <= (ended.record.started_at_us or 0) <= ended.record.ended_at_us
    assert ended.record.peak_rss_bytes > 0
    assert started(ended.folder).isolation == runtime.isolation


def test_arguments_reach_the_command_as_they_are(node: Node, runtime: Kit) -> None:
    words = ["a b", "$HOME", "'", "", "*", "é\n"]
    ended = node.run(["printf", "[%s]", *words], **runtime.fields)
    assert ended.text == "".join(f"[{word}]" for word in words)


@pytest.mark.parametrize("command", [["no-such-command", "x"], "no-such-command x"])
def test_missing_command_is_127(node: Node, runtime: Kit, command: list[str] | str) -> None:
    ended = node.run(command, **runtime.fields)
    assert (ended.code, ended.record.reason) == (127, "exited")
    assert ended.record.detail == "command not found: no-such-command"


def test_end_by_a_signal_is_recorded(node: Node, runtime: Kit) -> None:
    ended = node.run("kill -SEGV $$", **runtime.fields)
    assert (ended.code, ended.record.signal) == (128 + signal.SIGSEGV, signal.SIGSEGV)
    assert ended.record.detail == "ended by SIGSEGV"


def test_broken_pipes_end_commands_as_in_a_shell(node: Node, runtime: Kit) -> None:
    assert node.run("yes | head -n 1", **runtime.fields).text == "y"


def run_beyond_its_time(node: Node, command: str, **fields: Any) -> Ended:
    """Of a machine so slow that its time is over before the command is under way, more is given."""
    for timeout_s in (0.3, 3.0, PATIENCE_S):
        ended = node.run(command, timeout_s=timeout_s, **fields)
        if "ready" in ended.lines():
            return ended
    raise AssertionError("the command never came so far")


def test_timeout_ends_the_job(node: Node, runtime: Kit) -> None:
    ended = run_beyond_its_time(node, "echo ready; sleep 1000", **runtime.fields)
    assert ended.record.reason == "timed_out"
    assert ended.record.signal == signal.SIGTERM


def test_timeout_kills_a_job_that_ignores_it(node: Node, runtime: Kit) -> None:
    command = "trap '' TERM; echo ready; sleep 1000; sleep 1000"
    ended = run_beyond_its_time(node, command, **runtime.fields, stop_grace_s=0.3)
    assert (ended.record.reason, ended.record.signal) == ("timed_out", signal.SIGKILL)


def test_stop_lets_the_job_clean_up(node: Node, runtime: Kit) -> None:
    folder = node.start("trap 'echo saved; exit 0' TERM; echo ready; while :; do sleep 0.05; done", **runtime.fields)
    eventually(lambda: said(folder, "ready"), "the job's first line")
    folder.request_stop(60, "cancelled")
    ended = node.end_of(folder)
    assert (ended.code, ended.record.reason, ended.record.detail) == (0, "stopped", "cancelled")
    assert "saved" in ended.lines()


def test_stop_reaches_what_the_shell_started(node: Node, runtime: Kit) -> None:
    folder = node.start("echo ready; sleep 1000; echo after", **runtime.fields)
    eventually(lambda: said(folder, "ready"), "the job's first line")
    folder.request_stop(60, "cancelled")
    assert node.end_of(folder).record.signal == signal.SIGTERM


def test_stop_kills_a_job_that_ignores_it(node: Node, runtime: Kit) -> None:
    folder = node.start("trap '' TERM; echo ready; sleep 1000; sleep 1000", **runtime.fields)
    eventually(lambda: said(folder, "ready"), "the job's first line")
    folder.request_stop(0.2, "cancelled")
    ended = node.end_of(folder)
    assert (ended.record.reason, ended.record.signal) == ("stopped", signal.SIGKILL)


def test_later_stop_may_shorten_the_grace(node: Node, runtime: Kit) -> None:
    folder = node.start("trap 'echo heard' TERM; echo ready; while :; do sleep 0.05; done", **runtime.fields)
    eventually(lambda: said(folder, "ready"), "the job's first line")
    folder.request_stop(1000, "preempted")
    eventually(lambda: said(folder, "heard"), "the first signal")
    folder.request_stop(0, "evicted")
    assert node.end_of(folder).record.detail == "preempted"


def test_stop_before_the_start_never_runs_the_command(node: Node, runtime: Kit) -> None:
    folder = node.prepare("echo ran", **runtime.fields)
    folder.request_stop(0, "cancelled")
    zygote.start_attempt(node.socket, folder.path)
    ended = node.end_of(folder)
    assert (ended.code, ended.record.reason, ended.lines()) == (None, "stopped", [])
    assert folder.read_started() is None


def test_daemon_is_gone_when_the_command_ends(node: Node, runtime: Kit) -> None:
    ended = node.run(DAEMON + "exit 0", **runtime.fields)
    assert ended.code == 0
    assert processes_of(ended.folder) == []


def test_kill_of_the_shim_ends_all_of_the_job(node: Node, runtime: Kit) -> None:
    folder = node.start("trap '' TERM;" + DAEMON + "echo ready; sleep 1000", **runtime.fields)
    eventually(lambda: said(folder, "ready"), "the job's first line")
    assert len(processes_of(folder)) >= 2
    os.kill(shim_pid(folder), signal.SIGKILL)
    eventually(lambda: not processes_of(folder), "the end of the job")
    assert folder.read_exit() is None
    assert not folder.shim_is_alive()


def test_kill_of_the_shim_before_the_walls_stand_starts_nothing(node: Node) -> None:
    slow = node.path / "slow-bwrap"
    slow.write_text("#!/bin/sh\nexec sleep 1000\n")
    slow.chmod(0o755)
    folder = node.start("true", bwrap_path=str(slow))
    builder = eventually(lambda: processes.descendants(shim_pid(folder)), "what builds the walls")[0]
    eventually(lambda: Path(f"/proc/{builder}/comm").read_text() == "sleep\n", "bwrap")
    os.kill(shim_pid(folder), signal.SIGKILL)
    eventually(lambda: processes.start_ticks(builder) is None, "the end of what builds the walls")


def test_what_a_failed_shim_had_started_is_kept(node: Node) -> None:
    folder = node.start("echo ready; sleep 1000", isolation="process")
    eventually(lambda: said(folder, "ready"), "the job's first line")
    eventually(folder.read_started, "the record of the start")
    (folder.path / "stop.json").write_text("no record")
    ended = node.end_of(folder)
    assert ended.record.detail.startswith("the shim failed")
    assert ended.record.started_at_us


FREEZER = Path("/sys/fs/cgroup/freezer")


@pytest.mark.skipif(not os.access(FREEZER / "tasks", os.W_OK), reason="nothing here keeps a process from being killed")
def test_what_would_not_die_is_told_and_waited_for(node: Node) -> None:
    folder = node.start("echo ready; sleep 1000", isolation="process")
    eventually(lambda: said(folder, "ready"), "the job's first line")
    guardian, frozen = started(folder).pid, processes_of(folder)[-1]
    group = FREEZER / folder.path.name
    group.mkdir()
    try:
        (group / "tasks").write_text(str(frozen))
        (group / "freezer.state").write_text("FROZEN")
        os.kill(guardian, signal.SIGKILL)
        line = f"[nabla: 1 of its processes would not die: {frozen} (sleep)]"
        eventually(lambda: said(folder, line), "the word about it")
        assert folder.read_exit() is None
    finally:
        (group / "freezer.state").write_text("THAWED")
        eventually(lambda: processes.start_ticks(frozen) is None, "the end of the frozen process")
        group.rmdir()
    ended = node.end_of(folder)
    assert ended.record.reason == "exited"
    assert ended.record.detail.endswith(f"1 of its processes would not die: {frozen} (sleep)")
    assert "would not die" in folder.log.read_text()


def test_kill_of_the_zygote_is_not_noticed(node: Node, runtime: Kit) -> None:
    folder = node.start("echo ready; while [ ! -e go ]; do sleep 0.02; done; echo done", **runtime.fields)
    eventually(lambda: said(folder, "ready"), "the job's first line")
    node.zygote.kill()
    node.zygote.wait()
    (folder.workspace / "go").touch()
    ended = node.end_of(folder)
    assert (ended.code, ended.lines()) == (0, ["ready", "done"])
    node.start_zygote()
    assert zygote.start_attempt(node.socket, folder.path) == shim_pid(folder)


def test_started_twice_runs_once(node: Node, runtime: Kit) -> None:
    folder = node.prepare("echo ran >> log; cat log; sleep 0.1", **runtime.fields)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(lambda _: zygote.start_attempt(node.socket, folder.path), range(16)))
    ended = node.end_of(folder)
    assert answers == {shim_pid(folder)}
    assert zygote.start_attempt(node.socket, folder.path) in answers
    assert ended.lines() == ["ran"]


def test_memory_that_runs_out_is_named(node: Node, runtime: Kit) -> None:
    ended = node.run(["python3", "-c", EAT_MEMORY], **runtime.fields, memory_bytes=100 * MIB)
    assert (ended.record.reason, ended.record.signal) == ("out_of_memory", signal.SIGKILL)
    assert str(100 * MIB) in ended.record.detail
    assert ended.record.peak_rss_bytes > 50 * MIB


def test_a_worker_killed_for_memory_ends_the_whole_job(node: Node, runtime: Kit) -> None:
    parent = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]])\n"
        "while True: time.sleep(1)  # for a result that never comes\n"
    )
    ended = node.run(["python3", "-c", parent, EAT_MEMORY], **runtime.fields, memory_bytes=100 * MIB)
    assert (ended.record.reason, ended.record.signal) == ("out_of_memory", signal.SIGKILL)
    assert processes_of(ended.folder) == []


def test_processes_are_bounded(node: Node, runtime: Kit) -> None:
    script = (
        "import os, time\nn = 0\ntry:\n    while n < 500:\n        n += 1\n"
        "        if os.fork() == 0: time.sleep(1000)\nexcept OSError: print('refused', flush=True)\n"
    )
    ended = node.run(["python3", "-c", script], **runtime.fields, pids_limit=40)
    assert ended.lines() == ["refused"]
    assert processes_of(ended.folder) == []


def test_fork_bomb_ends_with_its_attempt(node: Node, runtime: Kit) -> None:
    bomb = "import os\nprint('armed', flush=True)\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    folder = node.start(["python3", "-c", bomb], **runtime.fields, pids_limit=60)
    eventually(lambda: said(folder, "armed"), "the bomb")
    folder.request_stop(0.1, "cancelled")
    assert node.end_of(folder).record.reason == "stopped"
    assert processes_of(folder) == []


def test_node_out_of_contact_fences_the_job(node: Node, runtime: Kit, tmp_path: Path) -> None:
    contact = tmp_path / "contact.json"
    record_contact(contact, time.clock_gettime(time.CLOCK_BOOTTIME) + 3600)
    wait = "for n in 0 1; do while [ ! -e go$n ]; do sleep 0.02; done; echo went $n; done"
    folder = node.start(
        f"trap '' TERM; echo ready; {wait}; sleep 1000; sleep 1000",
        **runtime.fields,
        node_contact_file=str(contact),
        node_fence_s=0.001,
    )
    eventually(lambda: said(folder, "ready"), "the job's first line")
    os.kill(shim_pid(folder), WAKE)  # it looks now; by the time the second line after that is read, it has
    for number in range(2):
        (folder.workspace / f"go{number}").touch()
        eventually(partial(said, folder, f"went {number}"), "the job's next line")
    assert folder.read_exit() is None
    record_contact(contact, 0)
    ended = node.end_of(folder)
    assert (ended.record.reason, ended.record.signal) == ("fenced", signal.SIGKILL)
    assert "out of contact" in ended.record.detail


def test_contact_that_was_never_made_fences_the_job(node: Node, runtime: Kit, tmp_path: Path) -> None:
    missing = str(tmp_path / "contact.json")
    ended = node.run("sleep 1000", **runtime.fields, node_contact_file=missing, node_fence_s=0.2)
    assert ended.record.reason == "fenced"


def test_contact_made_now_keeps_the_job(node: Node, runtime: Kit, tmp_path: Path) -> None:
    contact = tmp_path / "contact.json"
    shim.write_contact(contact)
    ended = node.run("sleep 1.2", **runtime.fields, node_contact_file=str(contact), node_fence_s=PATIENCE_S)
    assert ended.record.reason == "exited"


def test_flood_of_output_is_bounded_and_does_not_block(node: Node, runtime: Kit) -> None:
    limit = 4 * MIB
    ended = node.run("yes 0123456789 | head -c 60000000; echo end", **runtime.fields, log_limit_bytes=limit)
    assert ended.code == 0
    assert sum(path.stat().st_size for path in ended.folder.spool.iterdir()) <= limit + 1000
    lines = log_of(ended.folder)
    expected = 60_000_000 // 11 + 2
    assert sum(line.dropped or 1 for line in lines) == pytest.approx(expected, abs=1)
    assert any(line.dropped for line in lines)


def test_a_line_of_ten_megabytes_and_bytes_of_all_kinds_come_out_whole(node: Node, runtime: Kit) -> None:
    long = node.run("head -c 10000000 /dev/zero | tr '\\0' x; echo; echo next", **runtime.fields)
    *pieces, last, following = log_of(long.folder)
    assert (following.text, last.newline, any(piece.newline for piece in pieces)) == ("next", True, False)
    assert "".join(piece.text for piece in (*pieces, last)) == "x" * 10_000_000
    kinds = "import sys; sys.stdout.buffer.write(bytes(n for n in range(256) if n not in (10, 13)) * 4 + b'\\nend')"
    mixed = node.run(["python3", "-c", kinds], **runtime.fields).lines()
    expected = (bytes(n for n in range(256) if n not in (10, 13)) * 4).decode("utf-8", "replace")
    assert mixed == [expected, "end"]


def test_output_without_a_newline_is_seen_while_the_job_waits(node: Node, runtime: Kit) -> None:
    folder = node.start("printf 'continue? '; while [ ! -e go ]; do sleep 0.02; done", **runtime.fields)
    line = eventually(lambda: SpoolReader(folder.spool).read_from(0), "the prompt")[0]
    assert (line.text, line.newline) == ("continue? ", False)
    (folder.workspace / "go").touch()
    assert node.end_of(folder).code == 0


def test_malformed_spec_is_refused_with_its_reason(node: Node) -> None:
    folder = node.prepare("true")
    path = folder.path / "spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timeout_s": "soon"}))
    zygote.start_attempt(node.socket, folder.path)
    ended = node.end_of(folder)
    assert (ended.code, ended.record.reason) == (None, "refused")
    assert "timeout_s" in ended.record.detail


def test_missing_folder_starts_nothing(node: Node) -> None:
    with pytest.raises(zygote.StartFailed, match="FileNotFoundError"):
        zygote.start_attempt(node.socket, node.path / "attempts" / "none")


def test_zygote_leaves_with_its_parent(tmp_path: Path) -> None:
    parent = os.fork()
    if parent == 0:
        (tmp_path / "pid").write_text(str(zygote.start_zygote(tmp_path / "socket").pid))
        os._exit(0)
    os.waitpid(parent, 0)
    pid = int((tmp_path / "pid").read_text())
    eventually(lambda: processes.start_ticks(pid) is None, "the end of the zygote")


@pytest.mark.skipif(JOB_UID is None, reason="only root can run jobs as somebody else")
def test_job_is_never_root(node: Node, runtime: Kit) -> None:
    folder = node.start("echo ready; sleep 1000", **runtime.fields)
    eventually(lambda: said(folder, "ready"), "the job's first line")
    owners = {os.stat(f"/proc/{pid}").st_uid for pid in processes_of(folder)}
    assert owners == {JOB_UID}
    folder.request_stop(0, "over")
    node.end_of(folder)
    assert node.run("true", **runtime.fields, run_as_uid=None).record.reason == "refused"


def test_shim_stays_small_in_a_flood(node: Node, runtime: Kit) -> None:
    folder = node.start("yes 0123456789 | head -c 300000000; touch end; sleep 1000", **runtime.fields)
    eventually((folder.workspace / "end").exists, "the end of the flood")
    status = Path(f"/proc/{shim_pid(folder)}/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert peak_kib * 1024 < 64 * MIB
    folder.request_stop(0, "over")
    node.end_of(folder)


def record_contact(path: Path, boottime_s: float) -> None:
    path.write_text(json.dumps({"boottime_s": boottime_s, "boot_id": processes.boot_id()}))


def shim_pid(folder: AttemptFolder) -> int:
    record = folder.read_shim()
    assert record is not None
    return record.pid


SECRET = f"correct horse battery staple {os.getpid()}"  # nobody else on this machine has it


def test_a_secret_reaches_the_command_and_nothing_else(node: Node, runtime: Kit) -> None:
    command = 'echo "${#TOKEN} $TOKEN"; printf "%s" "$TOKEN" | base64 >&2; printf correct; sleep 0.3; echo " horse"'
    handed = json.dumps({"HF": SECRET, "OTHER": "another value"}).encode()
    folder = node.start(["sh", "-c", command], handed, **runtime.fields, secret_env={"TOKEN": "HF"})
    ended = node.end_of(folder)
    assert ended.lines("o") == [f"{len(SECRET)} ***", "correct horse"]
    assert ended.lines("e") == ["***"]
    for path in folder.path.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_a_secret_of_any_form_reaches_the_command_as_it_is(node: Node, runtime: Kit) -> None:
    value = 'it\'s "$HOME"\\ `id`\n# end\n\n' + "x" * 100_000
    handed = json.dumps({"A": value, "B": SECRET}).encode()
    command = 'printf "%s" "$A" | sha256sum | cut -c -64; env | grep -c nabla_'
    secret_env = {"A": "A", "PATH_TO": "B"}
    ended = node.end_of(node.start(command, handed, **runtime.fields, secret_env=secret_env))
    assert ended.lines() == [hashlib.sha256(value.encode()).hexdigest(), "0"]


def test_while_a_job_runs_only_its_own_processes_hold_its_secret(node: Node, runtime: Kit) -> None:
    handed = json.dumps({"HF": SECRET}).encode()
    folder = node.start("echo up; sleep 60", handed, **runtime.fields, secret_env={"TOKEN": "HF"})
    eventually(lambda: said(folder, "up"), "the job's word")
    root = started(folder).pid
    own = {root, *processes.descendants(root)}
    holders = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            assert SECRET.encode() not in Path("/proc", name, "cmdline").read_bytes(), name
            if SECRET.encode() in Path("/proc", name, "environ").read_bytes():
                holders.add(int(name))
            for link in Path("/proc", name, "fd").iterdir():
                assert "nabla-secrets" not in os.readlink(link), name
    assert holders
    assert holders <= own
    folder.request_stop(0.0, "enough")
    node.end_of(folder)


def test_a_job_whose_secret_was_not_handed_over_is_not_started(node: Node) -> None:
    ended = node.end_of(node.start("echo ran", secret_env={"TOKEN": "HF"}, isolation="process"))
    assert (ended.record.reason, ended.record.code) == ("refused", None)
    assert "the secret HF" in ended.record.detail
    assert ended.lines() == []
