"""Which environments a job may have."""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial
from pathlib import Path

import pytest

from libs.common.contracts.messages import Environment
from libs.common.waiting import end
from services.executor.adapters.agent.node_agent import environments_in_use
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec, ExitRecord
from services.executor.adapters.environments.building import RECORD, BuildOrder, python_of_record
from services.executor.adapters.environments.environments import (
    Asker,
    EnvironmentRefused,
    Environments,
    Prepared,
    key_of,
)
from services.executor.adapters.environments.interpreters import Interpreters, fits
from services.executor.adapters.environments.toolbox import Tell, ToolFailed
from services.executor.domain.requirements import Packages

pytestmark = pytest.mark.unit


def make_environment(path: Path, version: str = "3.11.7") -> Path:
    (path / "bin").mkdir(parents=True)
    (path / "bin" / "python").symlink_to(sys.executable)
    (path / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion_info = {version}\n")
    return path


class FakeBuilder:
    """Builds in no time, unless told to wait or to fail; counts."""

    def __init__(self) -> None:
        self.orders: list[BuildOrder] = []
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.failure = ""

    async def build(self, order: BuildOrder, tell: Tell) -> None:
        self.orders.append(order)
        tell("building")
        order.prefix.mkdir(parents=True)
        await self.may_go.wait()
        if self.failure:
            raise ToolFailed(self.failure)
        (order.prefix / RECORD).write_text("# python: 3.11.7 on x86_64\n")


@pytest.fixture
def builder() -> FakeBuilder:
    return FakeBuilder()


@pytest.fixture
def environments(tmp_path: Path, builder: FakeBuilder) -> Environments:
    make_environment(tmp_path / "default")
    (tmp_path / "node").mkdir()
    return Environments(tmp_path / "default", tmp_path / "cache", (tmp_path / "node",), builder)


def asker(workspace: Path = Path("/nowhere"), team_id: str = "te1", told: list[str] | None = None) -> Asker:
    return Asker(team_id, workspace, (told if told is not None else []).append)


async def prepare(environments: Environments, wanted: Environment, by: Asker | None = None) -> Prepared:
    async with environments.prepared(wanted, by or asker()) as found:
        return found


async def test_the_default_is_named_with_its_version(environments: Environments, tmp_path: Path) -> None:
    found = await prepare(environments, Environment())
    assert (found.prefix, found.name) == (str(tmp_path / "default"), "default (Python 3.11.7)")


async def test_an_environment_of_this_machine_is_taken_as_it_is(environments: Environments, tmp_path: Path) -> None:
    mine = make_environment(tmp_path / "mine", "3.12.1")
    found = await prepare(environments, Environment(kind="venv", path=str(mine)))
    assert found.name == f"{mine} (Python 3.12.1)"


@pytest.mark.parametrize("path", ["/", "relative", "/etc", "/nowhere", "../x"])
async def test_a_folder_that_is_no_environment_is_refused(path: str, environments: Environments) -> None:
    with pytest.raises(EnvironmentRefused):
        await prepare(environments, Environment(kind="venv", path=path))


async def test_no_environment_may_show_the_platforms_own_files(environments: Environments, tmp_path: Path) -> None:
    around = make_environment(tmp_path / "x")
    link = tmp_path / "link"
    for path in (make_environment(tmp_path / "node" / "cache"), tmp_path):
        if path == tmp_path:
            (tmp_path / "bin").mkdir()
            (tmp_path / "bin" / "python").symlink_to(sys.executable)
            (tmp_path / "pyvenv.cfg").touch()
        with pytest.raises(EnvironmentRefused, match="files of the platform"):
            await prepare(environments, Environment(kind="venv", path=str(path)))
    link.symlink_to(tmp_path / "node" / "cache")
    with pytest.raises(EnvironmentRefused, match="files of the platform"):
        await prepare(environments, Environment(kind="venv", path=str(link)))
    assert around.exists()


async def test_a_default_that_is_not_installed_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentRefused, match="not installed"):
        await prepare(Environments(tmp_path / "none", tmp_path, (), FakeBuilder()), Environment(kind="default"))


async def test_an_unknown_kind_is_refused(environments: Environments) -> None:
    with pytest.raises(EnvironmentRefused, match="not one of"):
        await prepare(environments, Environment(kind="docker"))


async def test_one_environment_is_built_once_however_it_is_written(
    environments: Environments, builder: FakeBuilder
) -> None:
    first = await prepare(environments, asking("NumPy == 2.0\nscipy"))
    again = await prepare(environments, asking("# the same\nscipy\nnumpy==2.0\n"))
    assert first == again
    assert len(builder.orders) == 1
    assert first.record
    assert first.record.exists()


async def test_what_differs_is_another_environment(environments: Environments) -> None:
    seen = {
        (await prepare(environments, asking("a"))).prefix,
        (await prepare(environments, asking("a==1"))).prefix,
        (await prepare(environments, asking("a"), asker(team_id="te2"))).prefix,
    }
    assert len(seen) == 3


async def test_two_jobs_that_ask_at_once_build_once_and_the_second_is_told(
    environments: Environments, builder: FakeBuilder
) -> None:
    builder.may_go.clear()
    told: list[str] = []
    first = asyncio.create_task(prepare(environments, asking("a"), asker(told=told)))
    second = asyncio.create_task(prepare(environments, asking("a"), asker(told=told)))
    try:
        async with asyncio.timeout(20):
            while len(told) < 2:
                await asyncio.sleep(0.01)
            builder.may_go.set()
            assert await first == await second
    finally:
        await end([first, second])
    assert len(builder.orders) == 1
    assert told == ["building", "waiting for the same environment, which another job of the team builds"]


async def test_a_failed_build_is_refused_with_the_installers_words_and_tried_anew_by_the_next(
    environments: Environments, builder: FakeBuilder
) -> None:
    builder.failure = "ERROR: No matching distribution found for nothing==1"
    with pytest.raises(EnvironmentRefused, match="No matching distribution found for nothing==1"):
        await prepare(environments, asking("nothing==1"))
    builder.failure = ""
    builder.orders[0].prefix.rmdir()
    await prepare(environments, asking("nothing==1"))
    assert len(builder.orders) == 2


async def test_a_file_of_the_workspace_says_what_to_build(
    environments: Environments, builder: FakeBuilder, tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    (workspace / "env").mkdir(parents=True)
    (workspace / "env" / "r.txt").write_text("-r ../more.txt\na")
    (workspace / "more.txt").write_text("b")
    (workspace / "pyproject.toml").write_text("[project]\ndependencies=['c']\n[dependency-groups]\nx=['d']")
    await prepare(environments, Environment(kind="workspace", path="env/r.txt"), asker(workspace))
    await prepare(environments, Environment(kind="workspace", path="pyproject.toml[x]"), asker(workspace))
    assert [order.packages.lines for order in builder.orders] == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "link", "folder", "none.txt", "up/secret"])
async def test_no_file_outside_of_the_workspace_is_read(path: str, environments: Environments, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    (workspace / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_text("s3cr3t")
    (workspace / "link").symlink_to("../secret")
    (workspace / "up").symlink_to("..")
    for wanted in (path, "list.txt"):
        (workspace / "list.txt").write_text(f"-r {path}")
        with pytest.raises(EnvironmentRefused, match="workspace") as refused:
            await prepare(environments, Environment(kind="workspace", path=wanted), asker(workspace))
        assert "s3cr3t" not in str(refused.value)


async def test_a_list_that_came_as_text_includes_nothing(environments: Environments) -> None:
    with pytest.raises(EnvironmentRefused, match="only files of the workspace"):
        await prepare(environments, asking("-r other.txt"))


async def test_a_python_that_the_node_lacks_is_refused_with_those_it_has(environments: Environments) -> None:
    ours = ".".join(map(str, sys.version_info[:3]))
    with pytest.raises(EnvironmentRefused, match=rf"no Python 2\.1; it has .*{ours}"):
        await prepare(environments, Environment(kind="requirements", requirements="a", python="2.1"))
    text = "[project]\nrequires-python='>=9'\ndependencies=['a']"
    for_nobody = Environment(kind="requirements", requirements=text, path="pyproject.toml")
    with pytest.raises(EnvironmentRefused, match="which the requirements are for"):
        await prepare(environments, for_nobody)


async def test_a_python_alone_is_an_environment_too(environments: Environments, builder: FakeBuilder) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = await prepare(environments, Environment(python=version))
    assert builder.orders[0].python.version.startswith(version)
    assert found.name.startswith(f"no requirements (Python {version}")


async def test_the_empty_list_is_refused(environments: Environments) -> None:
    with pytest.raises(EnvironmentRefused, match="empty"):
        await prepare(environments, asking(" \n"))


def test_a_version_fits_by_its_beginning() -> None:
    assert fits("3.12.1", "3.12", "")
    assert fits("3.12.1", "python3.12.1", ">=3.10")
    assert not fits("3.12.1", "3.1", "")
    assert not fits("3.12.1", "", "<3.12")
    assert not fits("3.12.1", "x", "nonsense")


def test_a_record_says_which_python_it_is_of() -> None:
    assert python_of_record("# python: 3.12.1 on x86_64\na==1\n") == "3.12.1"
    assert python_of_record("a==1\n") == ""


class Cache:
    """Built environments of 100 bytes each, as an earlier agent may have left them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make_environment(path / "default")
        self.python = Interpreters(path / "default" / "bin" / "python", ())
        self.attempts = path / "node" / "attempts"

    def environments(self, cache_bytes: int) -> Environments:
        in_use = partial(environments_in_use, self.attempts)
        cache = self.path / "cache"
        return Environments(self.path / "default", cache, (), FakeBuilder(), cache_bytes=cache_bytes, in_use=in_use)

    async def put(self, requirement: str, used_at_s: int) -> Path:
        python = await self.python.choose("", "")
        prefix = self.path / "cache" / key_of("te1", python, Packages((requirement,)))
        prefix.mkdir(parents=True)
        (prefix / ".complete").write_text("100")
        os.utime(prefix / ".complete", (used_at_s, used_at_s))
        return prefix

    def run_with(self, prefix: Path) -> AttemptFolder:
        spec = AttemptSpec(attempt_id="at1", job_id="js1", command="true", environment_prefix=str(prefix))
        return AttemptFolder.create(self.path / "node", spec)

    def left(self) -> set[Path]:
        return set((self.path / "cache").iterdir())


def asking(requirement: str) -> Environment:
    return Environment(kind="requirements", requirements=requirement)


async def test_beyond_its_size_the_cache_loses_the_longest_unused(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    old, older, new = await cache.put("old", 2), await cache.put("older", 1), await cache.put("new", 3)
    await prepare(cache.environments(300), asking("older"))
    assert cache.left() == {old, older, new}
    await prepare(cache.environments(200), asking("older"))
    assert cache.left() == {older, new}


async def test_an_environment_that_an_attempt_uses_is_never_deleted(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first, second = await cache.put("first", 1), await cache.put("second", 2)
    folder = cache.run_with(first)
    environments = cache.environments(0)
    async with environments.prepared(asking("second"), asker()):
        await prepare(environments, asking("second"))
        assert cache.left() == {first, second}
    third = await cache.put("third", 3)
    await prepare(environments, asking("third"))
    assert cache.left() == {first, third}
    end = ExitRecord(code=0, signal=None, reason="exited", detail="", peak_rss_bytes=0, started_at_us=1, ended_at_us=2)
    folder.write_exit(end)
    fourth = await cache.put("fourth", 4)
    await prepare(environments, asking("fourth"))
    assert cache.left() == {fourth}


async def test_what_an_earlier_agent_left_half_built_or_half_deleted_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for name in ("half", ".gone-1"):
        (tmp_path / "cache" / name / "lib").mkdir(parents=True)
    whole = await cache.put("whole", 1)
    await prepare(cache.environments(1000), asking("whole"))
    assert cache.left() == {whole}
