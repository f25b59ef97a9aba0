"""Which environments a job may have."""

from __future__ import annotations

import hashlib
import os
import sys
from functools import partial
from pathlib import Path

import pytest

from libs.common.contracts.messages import Environment
from services.executor.adapters.attempt_folder import AttemptFolder, AttemptSpec, ExitRecord
from services.executor.adapters.environments import EnvironmentRefused, Environments, Prepared, checked_requirements
from services.executor.adapters.node_agent import environments_in_use

pytestmark = pytest.mark.unit


def make_environment(path: Path, version: str = "3.11.7") -> Path:
    (path / "bin").mkdir(parents=True)
    (path / "bin" / "python").symlink_to(sys.executable)
    (path / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion_info = {version}\n")
    return path


@pytest.fixture
def environments(tmp_path: Path) -> Environments:
    make_environment(tmp_path / "default")
    (tmp_path / "node").mkdir()
    return Environments(tmp_path / "default", tmp_path / "cache", (tmp_path / "node",))


async def prepare(environments: Environments, wanted: Environment) -> Prepared:
    async with environments.prepared(wanted) as found:
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
        await prepare(Environments(tmp_path / "none", tmp_path, ()), Environment(kind="default"))


async def test_an_unknown_kind_is_refused(environments: Environments) -> None:
    with pytest.raises(EnvironmentRefused, match="not one of"):
        await prepare(environments, Environment(kind="docker"))


def test_requirements_name_packages_and_nothing_else() -> None:
    text = "# made by hand\nnumpy==2.1.0  # why\nrequests[socks] >= 2 ; python_version > '3.8'\nscipy\n"
    assert checked_requirements(text) == ["numpy==2.1.0", "requests[socks] >= 2 ; python_version > '3.8'", "scipy"]


@pytest.mark.parametrize(
    "line",
    [
        "-r /etc/passwd",
        "--index-url http://x",
        "-e .",
        "./here",
        "/abs",
        "a @ file:///etc/x",
        "git+https://x",
        "a==${PIP_INDEX_URL}",
        "a @ ${X}",
        "",
    ],
)
def test_requirements_that_read_other_places_are_refused(line: str) -> None:
    with pytest.raises(EnvironmentRefused):
        checked_requirements(line)


class Cache:
    """Built environments of 100 bytes each, as an earlier agent may have left them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make_environment(path / "default")
        self.attempts = path / "node" / "attempts"

    def environments(self, cache_bytes: int) -> Environments:
        in_use = partial(environments_in_use, self.attempts)
        return Environments(self.path / "default", self.path / "cache", (), cache_bytes, in_use)

    def put(self, requirement: str, used_at_s: int) -> Path:
        lines = "\n".join(["Python 3.11.7", requirement])
        prefix = self.path / "cache" / hashlib.sha256(lines.encode()).hexdigest()[:24]
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
    old, older, new = cache.put("old", 2), cache.put("older", 1), cache.put("new", 3)
    await prepare(cache.environments(300), asking("older"))
    assert cache.left() == {old, older, new}
    await prepare(cache.environments(200), asking("older"))
    assert cache.left() == {older, new}


async def test_an_environment_that_an_attempt_uses_is_never_deleted(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first, second = cache.put("first", 1), cache.put("second", 2)
    folder = cache.run_with(first)
    environments = cache.environments(0)
    async with environments.prepared(asking("second")):
        await prepare(environments, asking("second"))
        assert cache.left() == {first, second}
    third = cache.put("third", 3)
    await prepare(environments, asking("third"))
    assert cache.left() == {first, third}
    end = ExitRecord(code=0, signal=None, reason="exited", detail="", peak_rss_bytes=0, started_at_us=1, ended_at_us=2)
    folder.write_exit(end)
    fourth = cache.put("fourth", 4)
    await prepare(environments, asking("fourth"))
    assert cache.left() == {fourth}


async def test_what_an_earlier_agent_left_half_built_or_half_deleted_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for name in ("half", ".gone-1"):
        (tmp_path / "cache" / name / "lib").mkdir(parents=True)
    whole = cache.put("whole", 1)
    await prepare(cache.environments(1000), asking("whole"))
    assert cache.left() == {whole}
