"""A node whose disk is full: jobs there still end as they ended, can be stopped, and are not taken for lost."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.executor.adapters.attempts import processes, shim
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, Isolation, write_durably
from tests.integration.executor.attempts import Node, eventually, log_of, said, why_no_bwrap
from tests.support.disks import fill, free, small_disk_at

pytestmark = pytest.mark.integration

FILL = "cat /dev/zero > $TMPDIR/filler 2>/dev/null; : > $NABLA_WORKSPACE/full; "


@pytest.fixture
def disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nabla-disk-") as folder:
        Path(folder).chmod(0o711)
        with small_disk_at(Path(folder) / "node", 8) as disk:
            disk.chmod(0o711)
            yield disk


@pytest.fixture
def node(disk: Path) -> Iterator[Node]:
    node = Node(disk, control_groups=True)
    try:
        yield node
    finally:
        node.close()


@pytest.fixture(params=["bwrap", "process"])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    if request.param == "bwrap" and why_no_bwrap():
        pytest.skip(why_no_bwrap())
    chosen: Isolation = request.param
    return chosen


def test_a_job_that_fills_the_disk_ends_as_it_ended(node: Node, isolation: Isolation) -> None:
    ended = node.run(FILL + "exit 5", isolation=isolation)
    assert (ended.record.reason, ended.code) == ("exited", 5)


def test_a_job_that_fills_the_disk_can_be_stopped(node: Node, isolation: Isolation) -> None:
    folder = node.start(FILL + "sleep 1000", isolation=isolation)
    eventually((folder.workspace / "full").exists, "the full disk")
    folder.request_stop(0, "enough")
    assert node.end_of(folder).record.reason == "stopped"


def test_a_log_pauses_while_the_disk_is_full_says_so_and_goes_on(node: Node, isolation: Isolation) -> None:
    # More than a pipe holds: the shim has read of it before the disk is free again.
    command = "seq 100000; rm $TMPDIR/filler; while [ ! -e go ]; do echo after; sleep 0.02; done"
    command = f"echo before; {FILL}{command}"
    folder = node.start(command, isolation=isolation, disk_reserve_bytes=2_000_000)
    eventually(lambda: said(folder, "after"), "the log's next line")
    (folder.workspace / "go").touch()
    ended = node.end_of(folder)
    assert (ended.record.reason, ended.code) == ("exited", 0)
    gaps = [line for line in log_of(folder) if line.dropped]
    assert (ended.lines()[0], ended.lines()[-1], len(gaps)) == ("before", "after", 1)
    kept = [line for line in log_of(folder) if line.text.isdigit()]
    assert len(kept) + gaps[0].dropped >= 100_000


def test_an_end_waits_for_room_on_the_disk(node: Node, disk: Path) -> None:
    folder = node.start(": > $NABLA_WORKSPACE/up; while [ ! -e go ]; do sleep 0.02; done; exit 6", isolation="process")
    eventually((folder.workspace / "up").exists, "the start of the job")
    eventually(folder.read_started, "the record of the start")
    (folder.path / "reserve").unlink()
    fill(disk)
    (folder.workspace / "go").touch()
    eventually(lambda: has_refused(folder), "the first try")
    assert folder.shim_is_alive()
    free(disk)
    ended = node.end_of(folder)
    assert (ended.record.reason, ended.code) == ("exited", 6)


def has_refused(folder: AttemptFolder) -> bool:
    """The shim sleeps between its tries; what it says of them has no room on this disk."""
    return not any(folder.path.glob(".exit.json.*")) and descendants_are_gone(folder)


def descendants_are_gone(folder: AttemptFolder) -> bool:
    record = folder.read_shim()
    return record is not None and processes.descendants(record.pid) == []


def test_contact_is_recorded_on_a_full_disk(disk: Path) -> None:
    contact = disk / "contact.json"
    shim.write_contact(contact)
    before = json.loads(contact.read_bytes())["boottime_s"]
    fill(disk)
    shim.write_contact(contact)
    assert json.loads(contact.read_bytes())["boottime_s"] > before


def test_a_record_is_replaced_whole_or_not_at_all(disk: Path) -> None:
    path = disk / "record"
    write_durably(path, b"old")
    fill(disk)
    with (disk / "filler").open("r+b") as filler:
        filler.truncate((disk / "filler").stat().st_size - 4096)
    with pytest.raises(OSError, match="No space left"):
        write_durably(path, b"n" * 1_000_000)
    assert path.read_bytes() == b"old"
    assert sorted(entry.name for entry in disk.iterdir()) == ["filler", "record"]
