"""Workspaces from a real git server and a real object store."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from minio import Minio

from libs.common.contracts.messages import Source
from services.executor.adapters.runtimes.unpacking import unpack
from services.executor.adapters.workspaces.git_source import GitSource
from services.executor.adapters.workspaces.s3_source import S3Source
from services.executor.domain.sources import BadSource
from tests.integration.executor.tools import (
    GIT_BACKEND,
    GitHost,
    ToolNode,
    git_host,
    tool_node,
    web_server,
    why_no_walls,
)
from tests.support.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed, running_seaweed

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(why_no_walls()), reason=why_no_walls() or "walls"),
]
git_only = pytest.mark.skipif(not GIT_BACKEND.exists(), reason="git is not installed here: apt-get install git")
LIMIT = 50_000_000
PASSWORD = "canary-p%ss:word/@"


@pytest.fixture
async def node() -> AsyncIterator[ToolNode]:
    async with tool_node() as found:
        yield found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[GitHost]:
    with git_host(tmp_path / "host") as found:
        found.commit({"train.py": "print(1)", "data/a": "1", ".gitattributes": "data export-ignore\n"})
        yield found


class Fetcher:
    """Fetches and unpacks as the platform does; remembers what was told."""

    def __init__(self, node: ToolNode, host: GitHost, tmp_path: Path, limit_bytes: int = LIMIT) -> None:
        self.git = GitSource(node.toolbox, node.path / "fetching", (host.place,), limit_bytes)
        self.folder = tmp_path / "fetched"
        self.told: list[str] = []
        self.count = 0

    async def fetch(self, source: Source) -> tuple[str, Path]:
        commit = await self.git.find_commit(source)
        self.count += 1
        target = self.folder / str(self.count)
        target.mkdir(parents=True)
        await self.git.fetch(source, commit, target / "packed", self.told.append)
        with (target / "packed").open("rb") as packed:
            unpack(packed, target / "tree")
        return commit, target / "tree"


@git_only
async def test_a_commit_a_tag_and_a_branch_are_fetched_whole_and_without_git(
    node: ToolNode, host: GitHost, tmp_path: Path
) -> None:
    first = host.git("rev-parse", "HEAD")
    host.git("tag", "-a", "v1", "-m", "one")
    host.git("checkout", "-q", "-b", "feature/x")
    second = host.commit({"train.py": "print(2)"})
    host.git("checkout", "-q", "main")
    fetcher = Fetcher(node, host, tmp_path)
    for ref, commit, text in (("", first, "1"), ("v1", first, "1"), ("feature/x", second, "2"), (second, second, "2")):
        found, tree = await fetcher.fetch(Source(kind="git", url=f"git+{host.url}", ref=ref))
        assert found == commit
        assert (tree / "train.py").read_text() == f"print({text})"
        assert (tree / "data" / "a").read_text() == "1", "what the tree says of export does not count"
        assert not (tree / ".git").exists()
    assert not node.leftovers()


@git_only
async def test_what_is_not_there_is_told_by_its_name(node: ToolNode, host: GitHost, tmp_path: Path) -> None:
    fetcher = Fetcher(node, host, tmp_path)
    for ref in ("no-such-branch", "f" * 40):
        with pytest.raises(BadSource, match=f"there is no {ref} in {host.url}"):
            await fetcher.fetch(Source(kind="git", url=host.url, ref=ref))
    with pytest.raises(BadSource, match="cannot be fetched"):
        await fetcher.fetch(Source(kind="git", url=host.url.replace("work", "none")))
    assert not node.leftovers()


@git_only
async def test_credentials_open_a_repository_and_are_seen_nowhere(
    node: ToolNode, host: GitHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host.credentials = f"me:{PASSWORD}"
    fetcher = Fetcher(node, host, tmp_path)
    for said in ({}, {"username": "me", "password": "wrong"}):
        with pytest.raises(BadSource, match="user and password"):
            await fetcher.fetch(Source(kind="git", url=host.url, **said))
    _, tree = await fetcher.fetch(Source(kind="git", url=host.url, username="me", password=PASSWORD))
    kept = [path for path in (*tree.rglob("*"), *node.path.rglob("*")) if path.is_file()]
    seen = [str(path) for path in kept if PASSWORD.encode() in path.read_bytes()]
    assert seen == []
    assert PASSWORD not in caplog.text + "".join(fetcher.told)
    assert not any(PASSWORD in path for path in host.asked)


@git_only
async def test_a_redirect_to_another_place_leads_nowhere(node: ToolNode, host: GitHost, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with web_server(tmp_path / "inner") as (port, asked):
        host.redirect = f"http://127.0.0.1:{port}"
        with pytest.raises(BadSource, match="not among the places"):
            await Fetcher(node, host, tmp_path).fetch(Source(kind="git", url=host.url))
        assert asked == []


@git_only
async def test_a_private_address_is_refused_unless_the_settings_name_it(
    node: ToolNode, host: GitHost, tmp_path: Path
) -> None:
    git = GitSource(node.toolbox, node.path / "fetching", (), LIMIT)
    for name in ("127.0.0.1", "localhost"):
        with pytest.raises(BadSource, match="private address"):
            await git.find_commit(Source(kind="git", url=f"https://{name}:{host.port}/work/.git"))
    assert host.asked == []


@git_only
async def test_a_repository_over_the_limit_is_refused_with_the_number(
    node: ToolNode, host: GitHost, tmp_path: Path
) -> None:
    host.commit({"noise": os.urandom(3_000_000).hex()})
    with pytest.raises(BadSource, match="more than 1000000 bytes"):
        await Fetcher(node, host, tmp_path, 1_000_000).fetch(Source(kind="git", url=host.url))
    assert not node.leftovers()


@git_only
async def test_submodules_and_large_files_are_named_as_left_out(node: ToolNode, host: GitHost, tmp_path: Path) -> None:
    attributes = "*.bin filter=lfs diff=lfs merge=lfs -text\n"
    commit = host.commit({"models/.gitattributes": attributes, "models/a.bin": "version x"})
    host.git("update-index", "--add", "--cacheinfo", f"160000,{commit},vendor/lib")
    host.git("commit", "-q", "-m", "submodule")
    fetcher = Fetcher(node, host, tmp_path)
    _, tree = await fetcher.fetch(Source(kind="git", url=host.url))
    assert "submodules are not fetched: vendor/lib" in fetcher.told
    assert "files of git LFS stay pointers; see: models/.gitattributes" in fetcher.told
    assert (tree / "models" / "a.bin").read_text() == "version x"


@git_only
async def test_links_that_leave_the_repository_are_refused(node: ToolNode, host: GitHost, tmp_path: Path) -> None:
    from services.executor.adapters.runtimes.unpacking import BadArchive

    (host.work / "leak").symlink_to("/etc/passwd")
    host.commit({"x": "1"})
    with pytest.raises(BadArchive, match="leads out of it"):
        await Fetcher(node, host, tmp_path).fetch(Source(kind="git", url=host.url))


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with running_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


def tar(mode: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        member = tarfile.TarInfo("train.py")
        member.size = 8
        archive.addfile(member, io.BytesIO(b"print(1)"))
    return packed.getvalue()


def zipped() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("train.py", "print(1)")
    return packed.getvalue()


def test_archives_of_each_kind_come_from_a_bucket(seaweed: Seaweed, tmp_path: Path) -> None:
    client = Minio(seaweed.address, ACCESS_KEY, SECRET_KEY, secure=False)
    client.make_bucket("archives")
    s3 = S3Source((seaweed.address,), LIMIT)
    seen = set()
    for name, content in (("a.tar", tar("w")), ("a.tar.gz", tar("w:gz")), ("deep/a.zip", zipped())):
        client.put_object("archives", name, io.BytesIO(content), len(content))
        source = Source(
            kind="s3",
            url=f"s3://archives/{name}",
            endpoint=f"http://{seaweed.address}",
            username=ACCESS_KEY,
            password=SECRET_KEY,
        )
        found = s3.find(source)
        seen.add(found.etag)
        target = tmp_path / name.replace("/", "-")
        s3.fetch(source, found, target)
        with target.open("rb") as packed:
            unpack(packed, tmp_path / "out" / name)
        assert (tmp_path / "out" / name / "train.py").read_text() == "print(1)"
    assert len(seen) == 3

    def refused(s3: S3Source = s3, **other: str) -> str:
        with pytest.raises(BadSource) as error:
            s3.find(source.model_copy(update=other))
        return str(error.value)

    assert refused(url="s3://archives/none") == "there is no s3://archives/none"
    assert refused(url="s3://nobucket/none").startswith("there is no s3://nobucket/none")
    assert "is not given out for these credentials" in refused(password="wrong")
    assert refused(S3Source((seaweed.address,), 50)).endswith("50 is the most for a workspace")
    assert "does not begin with https" in refused(S3Source((), LIMIT))
    assert "private address" in refused(S3Source((), LIMIT), endpoint=f"https://{seaweed.address}")
