"""What a job asks to start from is fetched for its team, and nothing else of the node is ever laid into it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any, cast

import pytest

from libs.common.contracts.messages import JobTemplate, Source
from libs.common.errors import NotFound
from services.executor.adapters.agent.agent_bus import AgentBus
from services.executor.adapters.environments.toolbox import Tell
from services.executor.adapters.workspaces.sources import Found, key_of
from services.executor.adapters.workspaces.staging import Staging, StagingFailed, make_room
from services.executor.domain.sources import BadSource

pytestmark = pytest.mark.unit


class FakeBus:
    """Storage that knows no file set."""

    async def ask(self, *_: Any, **__: Any) -> Any:
        raise NotFound("fileset_not_found", "There is no such file set.")


class FakeSources:
    """Repositories by URL: what they are at, and a file's content. Counts what was fetched."""

    def __init__(self) -> None:
        self.commits = {"https://x/a.git": "1" * 40}
        self.fetched = 0

    async def find(self, source: Source) -> Found:
        if source.url not in self.commits:
            raise BadSource(f"there is no {source.url}")
        return Found(self.commits[source.url], key_of(source, self.commits[source.url]))

    async def fetch(self, source: Source, found: Found, target: Path, tell: Tell) -> None:
        self.fetched += 1
        tell("fetching")
        put_archive(target, found.version)


@pytest.fixture
def sources() -> FakeSources:
    return FakeSources()


@pytest.fixture
def staging(tmp_path: Path, sources: FakeSources) -> Staging:
    return Staging(cast("AgentBus", FakeBus()), tmp_path / "cache", "http://127.0.0.1:1", sources, 1000)


def silent(line: str) -> None:
    """Nobody listens."""


def put_archive(path: Path, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("secret")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content.encode()))


@pytest.mark.parametrize("asked", ["../other/fs1", "{root}/backup", "../../backup", "fs1\0", "a/b", "."])
async def test_a_workspace_is_named_by_an_id_and_never_by_a_path(asked: str, staging: Staging, tmp_path: Path) -> None:
    (tmp_path / "cache" / "mine").mkdir(parents=True)
    put_archive(tmp_path / "cache" / "other" / "fs1.tar.gz")
    put_archive(tmp_path / "backup.tar.gz")
    template = JobTemplate(command=("true",), workspace_id=asked.format(root=tmp_path))
    with pytest.raises(StagingFailed, match="not the id of a file set"):
        await staging.lay(template, "mine", tmp_path / "workspace", silent)
    assert not (tmp_path / "workspace" / "secret").exists()


async def test_a_kept_workspace_is_laid_without_asking(staging: Staging, tmp_path: Path) -> None:
    put_archive(tmp_path / "cache" / "mine" / "fs1.tar.gz")
    await staging.lay(JobTemplate(command=("true",), workspace_id="fs1"), "mine", tmp_path / "workspace", silent)
    assert (tmp_path / "workspace" / "secret").exists()


def test_the_longest_unused_archives_make_room(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old", "oldest")):
        path = tmp_path / "team" / f"{name}.tar.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - age, 1000 - age))
    make_room(tmp_path, 150)
    assert [path.name for path in (tmp_path / "team").iterdir()] == ["new.tar.gz"]


async def test_a_source_is_fetched_once_for_each_version_and_credential(
    staging: Staging, sources: FakeSources, tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"

    async def lay(**said: str) -> str:
        source = Source(kind="git", url="https://x/a.git", **said)
        return await staging.lay(JobTemplate(command=("true",), source=source), "mine", workspace, silent)

    assert await lay(ref="main") == await lay(ref="other") == "1" * 40
    assert (workspace / "secret").read_text() == "1" * 40
    assert sources.fetched == 1
    await lay(ref="main", password="else")
    assert sources.fetched == 2
    sources.commits["https://x/a.git"] = "2" * 40
    assert await lay(ref="main") == "2" * 40
    assert (workspace / "secret").read_text() == "2" * 40
    assert not list((tmp_path / "cache").rglob("*.part"))


async def test_a_source_that_is_not_there_is_told(staging: Staging, tmp_path: Path) -> None:
    template = JobTemplate(command=("true",), source=Source(kind="git", url="https://x/b.git"))
    with pytest.raises(StagingFailed, match=r"there is no https://x/b\.git"):
        await staging.lay(template, "mine", tmp_path / "workspace", silent)


async def test_a_workspace_over_the_limit_is_refused_with_the_number(staging: Staging, tmp_path: Path) -> None:
    put_archive(tmp_path / "cache" / "mine" / "fs1.tar.gz", "x" * 1001)
    with pytest.raises(StagingFailed, match="more than 1000 bytes"):
        await staging.lay(JobTemplate(command=("true",), workspace_id="fs1"), "mine", tmp_path / "workspace", silent)
