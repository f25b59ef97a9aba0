"""What a job leaves is kept or told as not kept: nothing in its folder may hold up its end for ever."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from libs.common.contracts.messages import Fileset, FilesetGrant, OpenFileset
from services.executor.adapters import sealing, transfer
from services.executor.adapters.agent_bus import AgentBus
from services.executor.adapters.sealing import NotKept, Owner, Sealing

pytestmark = pytest.mark.unit
OWNER = Owner("at1", "js1", 1, "t1", "pr1")


class FakeBus:
    """Storage that has every content already."""

    def __init__(self) -> None:
        self.opened: list[OpenFileset] = []

    async def ask(self, message: Any, *_: Any, **__: Any) -> Any:
        self.opened.append(message)
        return FilesetGrant(fileset=Fileset(id="fs1", state="sealed", file_count=len(message.files)))


@pytest.fixture
def bus() -> FakeBus:
    return FakeBus()


@pytest.fixture
def keeper(bus: FakeBus) -> Sealing:
    return Sealing(cast("AgentBus", bus), "http://127.0.0.1:1")


async def test_all_regular_files_are_kept_with_their_hashes(keeper: Sealing, bus: FakeBus, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"one")
    (tmp_path / "a").write_bytes(b"two")
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    assert await keeper.seal_artifacts(OWNER, tmp_path) == 2
    found = {file.path: file.sha256 for file in bus.opened[0].files}
    assert found == {"a": hashlib.sha256(b"two").hexdigest(), "b/x": hashlib.sha256(b"one").hexdigest()}


async def test_an_empty_folder_asks_nobody(keeper: Sealing, bus: FakeBus, tmp_path: Path) -> None:
    assert await keeper.seal_artifacts(OWNER, tmp_path) == 0
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


async def test_folders_too_deep_to_name_are_told_as_not_kept(keeper: Sealing, deep: Path) -> None:
    with pytest.raises(NotKept, match="nested deeper"):
        await keeper.seal_artifacts(OWNER, deep)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
async def test_a_file_that_nobody_may_read_is_told_as_not_kept(keeper: Sealing, tmp_path: Path) -> None:
    (tmp_path / "closed").write_bytes(b"")
    (tmp_path / "closed").chmod(0)
    with pytest.raises(NotKept, match="closed cannot be read"):
        await keeper.seal_artifacts(OWNER, tmp_path)


async def test_a_file_that_cannot_be_opened_is_told_as_not_kept(
    keeper: Sealing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").write_bytes(b"")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(NotKept, match="gone cannot be read: Permission denied"):
        await keeper.seal_artifacts(OWNER, tmp_path)


def refuse(path: Any, *_: Any, **__: Any) -> int:
    raise PermissionError(13, "Permission denied", str(path))


async def test_more_names_than_a_message_holds_are_told_as_not_kept(
    keeper: Sealing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "MAX_NAMES_BYTES", 1000)
    for number in range(5):
        (tmp_path / f"{number}{'n' * 230}").touch()
    with pytest.raises(NotKept, match="pack them into an archive"):
        await keeper.seal_artifacts(OWNER, tmp_path)


def test_a_tree_of_any_depth_and_without_permissions_is_deleted(deep: Path) -> None:
    top = deep / "d"
    (top / "files").mkdir()
    (top / "files" / "x").touch()
    (top / "files").chmod(0)
    (top / "link").symlink_to(deep)
    transfer.remove_tree(top)
    assert list(deep.iterdir()) == []
    top.mkdir()
