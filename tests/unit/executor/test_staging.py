"""What a job asks to start from is fetched for its team, and nothing else of the node is ever laid into it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any, cast

import pytest

from libs.common.contracts.messages import JobTemplate
from libs.common.errors import NotFound
from services.executor.adapters.agent_bus import AgentBus
from services.executor.adapters.staging import Staging, StagingFailed, make_room

pytestmark = pytest.mark.unit


class FakeBus:
    """Storage that knows no file set."""

    async def ask(self, *_: Any, **__: Any) -> Any:
        raise NotFound("fileset_not_found", "There is no such file set.")


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(cast("AgentBus", FakeBus()), tmp_path / "cache", "http://127.0.0.1:1")


def put_archive(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("secret"), io.BytesIO())


@pytest.mark.parametrize("asked", ["../other/fs1", "{root}/backup", "../../backup", "fs1\0", "a/b", "."])
async def test_a_workspace_is_named_by_an_id_and_never_by_a_path(asked: str, staging: Staging, tmp_path: Path) -> None:
    (tmp_path / "cache" / "mine").mkdir(parents=True)
    put_archive(tmp_path / "cache" / "other" / "fs1.tar.gz")
    put_archive(tmp_path / "backup.tar.gz")
    template = JobTemplate(command=("true",), workspace_id=asked.format(root=tmp_path))
    with pytest.raises(StagingFailed, match="not the id of a file set"):
        await staging.lay(template, "mine", tmp_path / "workspace")
    assert not (tmp_path / "workspace" / "secret").exists()


async def test_a_kept_workspace_is_laid_without_asking(staging: Staging, tmp_path: Path) -> None:
    put_archive(tmp_path / "cache" / "mine" / "fs1.tar.gz")
    await staging.lay(JobTemplate(command=("true",), workspace_id="fs1"), "mine", tmp_path / "workspace")
    assert (tmp_path / "workspace" / "secret").exists()


def test_the_longest_unused_archives_make_room(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old", "oldest")):
        path = tmp_path / "team" / f"{name}.tar.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - age, 1000 - age))
    make_room(tmp_path, 150)
    assert [path.name for path in (tmp_path / "team").iterdir()] == ["new.tar.gz"]
