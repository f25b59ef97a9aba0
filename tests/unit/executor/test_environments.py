"""Which environments a job may have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from libs.common.contracts.messages import Environment
from services.executor.adapters.environments import EnvironmentRefused, Environments, checked_requirements

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


async def test_the_default_is_named_with_its_version(environments: Environments, tmp_path: Path) -> None:
    found = await environments.prepare(Environment())
    assert (found.prefix, found.name) == (str(tmp_path / "default"), "default (Python 3.11.7)")


async def test_an_environment_of_this_machine_is_taken_as_it_is(environments: Environments, tmp_path: Path) -> None:
    mine = make_environment(tmp_path / "mine", "3.12.1")
    found = await environments.prepare(Environment(kind="venv", path=str(mine)))
    assert found.name == f"{mine} (Python 3.12.1)"


@pytest.mark.parametrize("path", ["/", "relative", "/etc", "/nowhere", "../x"])
async def test_a_folder_that_is_no_environment_is_refused(path: str, environments: Environments) -> None:
    with pytest.raises(EnvironmentRefused):
        await environments.prepare(Environment(kind="venv", path=path))


async def test_no_environment_may_show_the_platforms_own_files(environments: Environments, tmp_path: Path) -> None:
    around = make_environment(tmp_path / "x")
    link = tmp_path / "link"
    for path in (make_environment(tmp_path / "node" / "cache"), tmp_path):
        if path == tmp_path:
            (tmp_path / "bin").mkdir()
            (tmp_path / "bin" / "python").symlink_to(sys.executable)
            (tmp_path / "pyvenv.cfg").touch()
        with pytest.raises(EnvironmentRefused, match="files of the platform"):
            await environments.prepare(Environment(kind="venv", path=str(path)))
    link.symlink_to(tmp_path / "node" / "cache")
    with pytest.raises(EnvironmentRefused, match="files of the platform"):
        await environments.prepare(Environment(kind="venv", path=str(link)))
    assert around.exists()


async def test_a_default_that_is_not_installed_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentRefused, match="not installed"):
        await Environments(tmp_path / "none", tmp_path, ()).prepare(Environment(kind="default"))


async def test_an_unknown_kind_is_refused(environments: Environments) -> None:
    with pytest.raises(EnvironmentRefused, match="not one of"):
        await environments.prepare(Environment(kind="docker"))


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
