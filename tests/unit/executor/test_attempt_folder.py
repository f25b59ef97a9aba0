"""The contract on disk between the node agent and the shim."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from services.executor.adapters.attempts import processes
from services.executor.adapters.attempts.attempt_folder import (
    AttemptFolder,
    AttemptSpec,
    Bind,
    ExitRecord,
    FrontDoor,
    MalformedSpec,
    ShimRecord,
    StartedRecord,
    StopRecord,
    write_durably,
)

pytestmark = pytest.mark.unit

SPEC = AttemptSpec(
    attempt_id="at01j",
    job_id="js01j",
    command=["python", "train.py"],
    env={"A": "b"},
    gpu_indices=[2, 3],
    binds_ro=[Bind("/data/sets", "/data")],
    binds_rw=[Bind("/mnt/storage", "/storage")],
    front_door=[FrontDoor(8080, "127.0.0.1", 80)],
    expose_ports=[8888],
    timeout_s=1.5,
)


def own_record() -> ShimRecord:
    return ShimRecord(os.getpid(), processes.start_ticks(os.getpid()) or 0, processes.boot_id())


def test_spec_comes_back_as_it_was(tmp_path: Path) -> None:
    assert AttemptFolder.create(tmp_path, SPEC).read_spec() == SPEC


def test_folder_and_spec_are_private(tmp_path: Path) -> None:
    folder = AttemptFolder.create(tmp_path, SPEC)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder.path / "spec.json").stat().st_mode) == 0o600


def test_creating_twice_keeps_the_first_spec(tmp_path: Path) -> None:
    AttemptFolder.create(tmp_path, SPEC)
    other = AttemptSpec(attempt_id=SPEC.attempt_id, job_id="js2", command="other")
    assert AttemptFolder.create(tmp_path, other).read_spec() == SPEC


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    folder = AttemptFolder.create(tmp_path, SPEC)
    started = StartedRecord(7, 123, "bwrap", {8888: 40001})
    ended = ExitRecord(
        code=0, signal=None, reason="exited", detail="", peak_rss_bytes=1, started_at_us=1, ended_at_us=2
    )
    folder.write_shim(own_record())
    folder.write_started(started)
    folder.write_exit(ended)
    assert (folder.read_shim(), folder.read_started(), folder.read_exit()) == (own_record(), started, ended)


def test_records_that_are_not_there_yet_read_as_none(tmp_path: Path) -> None:
    folder = AttemptFolder.create(tmp_path, SPEC)
    reads = (folder.read_shim(), folder.read_started(), folder.read_stop(), folder.read_exit())
    assert reads == (None, None, None, None)
    assert not folder.shim_is_alive()


def test_stop_can_be_repeated_and_the_last_one_is_read(tmp_path: Path) -> None:
    folder = AttemptFolder.create(tmp_path, SPEC)
    folder.request_stop(15, "cancelled")
    folder.request_stop(1, "evicted")
    assert folder.read_stop() == StopRecord(1, "evicted")


def test_shim_of_another_boot_or_another_start_is_dead(tmp_path: Path) -> None:
    folder, record = AttemptFolder.create(tmp_path, SPEC), own_record()
    folder.write_shim(record)
    assert folder.shim_is_alive()
    folder.write_shim(ShimRecord(record.pid, record.start_ticks + 1, record.boot_id))
    assert not folder.shim_is_alive()
    folder.write_shim(ShimRecord(record.pid, record.start_ticks, "another boot"))
    assert not folder.shim_is_alive()


def test_zombie_counts_as_dead() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert processes.start_ticks(pid) is None
    os.waitpid(pid, 0)


def test_lock_is_held_once(tmp_path: Path) -> None:
    folder = AttemptFolder.create(tmp_path, SPEC)
    with folder.try_lock() as first, folder.try_lock() as second:
        assert first is not None
        assert second is None
    with folder.try_lock() as again:
        assert again is not None


def test_replaced_file_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_durably(tmp_path / "file", content)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"two")]


def test_field_of_a_newer_agent_is_ignored(tmp_path: Path) -> None:
    folder = AttemptFolder.create(tmp_path, SPEC)
    path = folder.path / "spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"invented_later": 1}))
    assert folder.read_spec() == SPEC


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attempt_id", "../escape"),
        ("attempt_id", ""),
        ("command", []),
        ("command", ""),
        ("command", ["echo", 1]),
        ("command", "nul \0 inside"),
        ("command", None),
        ("env", {"A=B": "c"}),
        ("env", {"A": 1}),
        ("env", {"A": "\0"}),
        ("env", []),
        ("cpu_count", 0),
        ("cpu_count", "many"),
        ("memory_bytes", -1),
        ("timeout_s", "soon"),
        ("stop_grace_s", -1),
        ("pids_limit", True),
        ("log_limit_bytes", -1),
        ("isolation", "none"),
        ("binds_ro", [["/a"]]),
        ("binds_ro", [["relative", "/a"]]),
        ("binds_rw", [["/a", "/b/../../etc"]]),
        ("workspace_path", "here"),
        ("front_door", [{"listen_port": 0, "target_host": "h", "target_port": 1}]),
        ("front_door", [{"listen_port": 1}]),
        ("expose_ports", [70000]),
        ("gpu_indices", ["0"]),
        ("run_as_uid", 0),
    ],
)
def test_malformed_spec_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    folder = AttemptFolder.create(tmp_path, SPEC)
    path = folder.path / "spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(MalformedSpec):
        folder.read_spec()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"attempt_id": "a"}', "\x00"])
def test_unreadable_spec_is_refused(text: str) -> None:
    with pytest.raises(MalformedSpec):
        AttemptSpec.from_json(text)


def test_missing_spec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedSpec):
        AttemptFolder(tmp_path).read_spec()
