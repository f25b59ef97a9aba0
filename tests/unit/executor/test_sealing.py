"""What a job leaves is kept or told as not kept: nothing in its folder may hold up its end for ever."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

from libs.common.contracts.messages import Fileset, FilesetGrant, ModelOutput, OpenFileset, SealFileset
from libs.common.errors import Conflict
from services.executor.adapters.agent.agent_bus import AgentBus
from services.executor.adapters.agent.unkept import bound_unkept
from services.executor.adapters.workspaces import sealing, transfer
from services.executor.adapters.workspaces.sealing import NotKept, Owner, Sealing
from services.storage.domain import filesets
from services.storage.domain.filesets import entries_of
from tests.support.users import ordinary_user

pytestmark = pytest.mark.unit
OWNER = Owner("at1", "js1", 1, "t1", "pr1")


class FakeBus:
    """Storage that has every content already, or else asks for `part` files a turn and checks before it seals."""

    def __init__(self) -> None:
        self.opened: list[OpenFileset] = []
        self.part = 0
        self.url = ""
        self.has: set[str] = set()

    async def ask(self, message: Any, *_: Any, **__: Any) -> Any:
        if isinstance(message, SealFileset):
            return self._sealed()
        self.opened.append(message)
        if not self.part:
            return FilesetGrant(fileset=Fileset(id="fs1", state="sealed", file_count=len(message.files)))
        missing = [file for file in message.files if file.path not in self.has][: self.part]
        uploads = tuple(file.model_copy(update={"url": f"{self.url}/{file.path}"}) for file in missing)
        return FilesetGrant(fileset=Fileset(id="fs1", state="open"), uploads=uploads)

    def _sealed(self) -> Fileset:
        count = len(self.opened[-1].files)
        if len(self.has) < count:
            raise Conflict("files_missing", "Some files have not arrived.")
        return Fileset(id="fs1", state="sealed", file_count=count)


class Store(ThreadingHTTPServer):
    """Takes what is PUT; tells the bus of it unless it loses everything."""

    def __init__(self, bus: FakeBus, loses: bool = False, refusals: int = 0) -> None:
        left = [refusals]

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                left[0] -= 1
                if left[0] < 0 and not loses:
                    bus.has.add(self.path.removeprefix("/"))
                self.send_response(403 if left[0] >= 0 else 200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        super().__init__(("127.0.0.1", 0), Handler)
        bus.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture
def bus() -> FakeBus:
    return FakeBus()


@pytest.fixture
def keeper(bus: FakeBus) -> Sealing:
    return Sealing(cast("AgentBus", bus), "http://127.0.0.1:1")


async def kept_by(keeper: Sealing, folder: Path) -> int:
    """Of a folder in which every file can be kept."""
    kept = await keeper.seal_artifacts(OWNER, folder)
    assert kept.left_out.lines() == []
    return kept.file_count


async def left_out_by(keeper: Sealing, folder: Path) -> list[str]:
    return (await keeper.seal_artifacts(OWNER, folder)).left_out.lines()


def paths(bus: FakeBus) -> list[str]:
    return [file.path for file in bus.opened[-1].files]


async def test_all_regular_files_are_kept_with_their_hashes(keeper: Sealing, bus: FakeBus, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"one")
    (tmp_path / "a").write_bytes(b"two")
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    assert await kept_by(keeper, tmp_path) == 2
    found = {file.path: file.sha256 for file in bus.opened[0].files}
    assert found == {"a": hashlib.sha256(b"two").hexdigest(), "b/x": hashlib.sha256(b"one").hexdigest()}


async def test_an_empty_folder_asks_nobody(keeper: Sealing, bus: FakeBus, tmp_path: Path) -> None:
    assert await kept_by(keeper, tmp_path) == 0
    assert bus.opened == []


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """Deeper than Python recurses, and than any path can say."""
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(3000):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    yield tmp_path
    transfer.remove_tree(tmp_path / "d")


async def test_folders_too_deep_to_name_are_left_out(keeper: Sealing, bus: FakeBus, deep: Path) -> None:
    (deep / "fine").touch()
    left_out = await left_out_by(keeper, deep)
    assert len(left_out) == 1
    assert "nested deeper than 200 folders" in left_out[0]
    assert paths(bus) == ["fine"]


async def test_what_nobody_may_read_is_left_out(keeper: Sealing, bus: FakeBus) -> None:
    with ordinary_user() as folder:
        for name in ("closed", "fine"):
            (folder / name).write_bytes(b"")
        (folder / "closed").chmod(0)
        (folder / "shut").mkdir(mode=0)
        found = await left_out_by(keeper, folder)
    assert found == ["closed: cannot be read: Permission denied", "shut: cannot be read: Permission denied"]
    assert paths(bus) == ["fine"]


async def test_a_file_that_cannot_be_opened_is_left_out_and_the_rest_is_kept(
    keeper: Sealing, bus: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bad", "fine"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(os, "open", RefusesSome("bad"))
    assert await left_out_by(keeper, tmp_path) == ["bad: cannot be read: Permission denied"]
    assert paths(bus) == ["fine"]


class RefusesSome:
    """os.open, refused for files of one name, at once or after so many times."""

    def __init__(self, name: str, after: int = 0) -> None:
        self._open, self._name, self._left = os.open, name, after

    def __call__(self, path: Any, *args: Any, **kwargs: Any) -> int:
        if os.path.basename(os.fspath(path)) == self._name:
            self._left -= 1
            if self._left < 0:
                raise PermissionError(13, "Permission denied", str(path))
        return self._open(path, *args, **kwargs)


async def test_names_that_storage_refuses_are_left_out(keeper: Sealing, bus: FakeBus, tmp_path: Path) -> None:
    (tmp_path / "fine").touch()
    (tmp_path / os.fsdecode(b"no text \xff")).touch()
    (tmp_path / "two\nlines").touch()
    (tmp_path / "back\\slash").mkdir()
    (tmp_path / "back\\slash" / "inner").touch()
    left_out = await left_out_by(keeper, tmp_path)
    assert sorted(left_out) == [
        "back\\\\slash: its name holds a control character or a backslash",
        "no text \\\\udcff: its name is not text",
        "two\\nlines: its name holds a control character or a backslash",
    ]
    assert paths(bus) == ["fine"]
    entries_of(bus.opened[-1].files)


async def test_all_that_is_listed_is_taken_by_storage(keeper: Sealing, bus: FakeBus, tmp_path: Path) -> None:
    """The bounds are written in two services, which share no code: here they meet."""
    assert (sealing.MAX_FILE_BYTES, sealing.MAX_PATH_BYTES) == (filesets.MAX_FILE_BYTES, filesets.MAX_PATH_BYTES)
    long = tmp_path.joinpath(*("n" * 250 for _ in range(4)))
    long.mkdir(parents=True)
    (long / ("x" * 20)).touch()
    (long / ("x" * 21)).touch()
    left_out = await left_out_by(keeper, tmp_path)
    assert len(left_out) == 1
    assert "longer than 1024 bytes" in left_out[0]
    assert len(entries_of(bus.opened[-1].files)) == 1


async def test_a_file_too_large_for_one_upload_is_left_out_unread(
    keeper: Sealing, bus: FakeBus, tmp_path: Path
) -> None:
    (tmp_path / "fine").touch()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(sealing.MAX_FILE_BYTES + 1)
    assert await left_out_by(keeper, tmp_path) == ["large: larger than the 5 GiB that a file may have; split it"]
    assert paths(bus) == ["fine"]


async def test_of_too_many_files_the_first_are_kept_and_a_few_of_the_others_named(
    keeper: Sealing, bus: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "MAX_FILES", 3)
    for number in range(13):
        (tmp_path / f"{number:02}").touch()
    left_out = await left_out_by(keeper, tmp_path)
    assert paths(bus) == ["00", "01", "02"]
    assert [line[:4] for line in left_out] == ["03: ", "04: ", "05: ", "06: ", "07: ", "5 mo"]


async def test_of_more_names_than_a_message_holds_the_first_are_kept(
    keeper: Sealing, bus: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "MAX_NAMES_BYTES", 1000)
    for number in range(5):
        (tmp_path / f"{number}{'n' * 230}").touch()
    (left_out,) = await left_out_by(keeper, tmp_path)
    assert "pack files into an archive" in left_out
    assert len(paths(bus)) == 4


async def test_a_file_lost_before_its_upload_costs_itself_alone(
    keeper: Sealing, bus: FakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).touch()
    bus.part = 10
    monkeypatch.setattr(os, "open", RefusesSome("b", after=1))
    with Store(bus):
        kept = await keeper.seal_artifacts(OWNER, tmp_path)
    assert (kept.file_count, kept.left_out.lines()) == (2, ["b: cannot be read: Permission denied"])


async def test_a_model_with_a_file_that_cannot_be_kept_is_refused(
    keeper: Sealing, bus: FakeBus, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    for name in ("weights", "two\nlines"):
        (tmp_path / "m" / name).touch()
    with pytest.raises(NotKept, match="control character"):
        await keeper.register_model(OWNER, tmp_path, ModelOutput(name="digits", path="m"))
    assert bus.opened == []


async def test_a_set_that_storage_takes_in_many_parts_is_kept(keeper: Sealing, bus: FakeBus, tmp_path: Path) -> None:
    for number in range(3 * sealing.SEAL_TRIES):
        (tmp_path / str(number)).touch()
    bus.part = 1
    with Store(bus):
        assert await kept_by(keeper, tmp_path) == 3 * sealing.SEAL_TRIES
    assert len({message.digest for message in bus.opened}) == 1


async def test_uploads_that_never_arrive_are_told_as_not_kept(keeper: Sealing, bus: FakeBus, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    bus.part = 1
    with Store(bus, loses=True), pytest.raises(NotKept, match="have not arrived"):
        await keeper.seal_artifacts(OWNER, tmp_path)
    assert len(bus.opened) == 1 + sealing.SEAL_TRIES


async def test_a_store_that_refuses_every_url_is_not_asked_for_ever(
    keeper: Sealing, bus: FakeBus, tmp_path: Path
) -> None:
    (tmp_path / "a").touch()
    bus.part = 1
    with Store(bus, refusals=1000), pytest.raises(transfer.TransferRefused, match="403"):
        await keeper.seal_artifacts(OWNER, tmp_path)
    assert len(bus.opened) == sealing.REFUSED_TRIES


async def test_urls_that_ran_out_are_replaced(keeper: Sealing, bus: FakeBus, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch()
    bus.part = 1
    with Store(bus, refusals=sealing.REFUSED_TRIES - 1):
        assert await kept_by(keeper, tmp_path) == 2


def test_what_was_not_kept_goes_by_age_and_size_the_oldest_first(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x" * 100_000)
    now_s = (tmp_path / "c").lstat().st_ctime
    bound_unkept(tmp_path, 10**9, 3600.0, now_s)
    assert len(list(tmp_path.iterdir())) == 3
    bound_unkept(tmp_path, 250_000, 3600.0, now_s)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    bound_unkept(tmp_path, 10**9, 3600.0, now_s + 7200.0)
    assert list(tmp_path.iterdir()) == []
    bound_unkept(tmp_path / "nowhere", 0, 0.0, now_s)


def test_a_tree_of_any_depth_and_without_permissions_is_deleted(deep: Path) -> None:
    top = deep / "d"
    (top / "files").mkdir()
    (top / "files" / "x").touch()
    (top / "files").chmod(0)
    (top / "link").symlink_to(deep)
    transfer.remove_tree(top)
    assert list(deep.iterdir()) == []
    top.mkdir()
