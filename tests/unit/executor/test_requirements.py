"""What people write down becomes the same lines, whichever file they use, and never reads anything of the node."""

from __future__ import annotations

import pytest
from packaging.markers import default_environment

from services.executor.domain.requirements import BadRequirements, Packages, packages_of, python_wanted, split_extras

pytestmark = pytest.mark.unit

MARKERS = {**{k: str(v) for k, v in default_environment().items()}, "python_version": "3.12", "sys_platform": "linux"}


def of(path: str, text: str, **others: str) -> Packages:
    def read(name: str) -> str:
        if name not in others:
            raise BadRequirements(f"the workspace has no {name}")
        return others[name]

    return packages_of(path, text, MARKERS, read)


def test_two_spellings_of_one_wish_are_the_same() -> None:
    one = of("requirements.txt", "# made by hand\nNumPy == 2.1.0  # why\nrequests[socks]>=2 ; python_version>'3.8'\n")
    other = of("r.txt", 'requests[socks] >= 2; python_version > "3.8"\r\nnumpy==2.1.0')
    assert one == other
    assert one.lines == ("numpy==2.1.0", 'requests[socks]>=2; python_version > "3.8"')


@pytest.mark.parametrize(
    "line",
    [
        "--index-url http://x",
        "--extra-index-url=http://x",
        "-e .",
        "./here",
        "/abs",
        ".",
        "a @ file:///etc/x",
        "a @ https://host/a.whl",
        "git+https://x",
        "a @ git+https://host/x@0123456789012345678901234567890123456789",
        "a==${PIP_INDEX_URL}",
        "a @ ${X}",
        "a --global-option=x",
        "a --config-settings x=y",
        "-f /etc",
        "--trusted-host x",
    ],
)
def test_what_reads_other_places_is_refused(line: str) -> None:
    with pytest.raises(BadRequirements, match="index that the platform"):
        of("requirements.txt", line)


def test_hashes_stay_with_their_package_over_continued_lines() -> None:
    text = "--require-hashes\na==1 \\\n    --hash=sha256:BB \\\n    --hash=sha256:aa\n"
    assert of("requirements.txt", text).lines == ("a==1 --hash=sha256:aa --hash=sha256:bb",)


def test_files_of_the_workspace_may_include_each_other() -> None:
    found = of("env/requirements.txt", "-r base.txt\n-c ../limits.txt\nb", **{
        "env/base.txt": "a\n-r requirements.txt\n", "env/../limits.txt": "numpy<2\n", "env/requirements.txt": "b",
    })  # fmt: skip
    assert found == Packages(("a", "b"), ("numpy<2",))
    with pytest.raises(BadRequirements, match="has no"):
        of("requirements.txt", "-r /etc/passwd")


PYPROJECT = """
[project]
name = "My.Thing"
requires-python = ">=3.11"
dependencies = ["NumPy>=2"]
[project.optional-dependencies]
train = ["torch"]
all = ["my-thing[train]", "rich"]
[dependency-groups]
test = ["pytest", {include-group = "lint"}]
lint = ["ruff"]
"""


def test_a_pyproject_gives_its_dependencies_and_the_extras_and_groups_that_are_named() -> None:
    assert of("pyproject.toml", PYPROJECT).lines == ("numpy>=2",)
    assert of("pyproject.toml[all]", PYPROJECT).lines == ("numpy>=2", "rich", "torch")
    assert of("a/pyproject.toml[test]", PYPROJECT).lines == ("numpy>=2", "pytest", "ruff")
    assert python_wanted("pyproject.toml", PYPROJECT) == ">=3.11"
    with pytest.raises(BadRequirements, match="it has all, lint, test, train"):
        of("pyproject.toml[gpu]", PYPROJECT)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[tool.poetry]", "no .project. table"),
        ("[project]\ndynamic = ['dependencies']", "dynamic"),
        ("[project", "cannot be read"),
        ("[project]\ndependencies = ['a @ file:///x']", "place of its own"),
    ],
)
def test_a_pyproject_that_says_nothing_is_told_so(text: str, why: str) -> None:
    with pytest.raises(BadRequirements, match=why):
        of("pyproject.toml", text)


UV_LOCK = """
requires-python = ">=3.11"
[[package]]
name = "mine"
version = "0.1"
source = { virtual = "." }
dependencies = [
    { name = "a", extra = ["fast"] },
    { name = "win", marker = "sys_platform == 'win32'" },
    { name = "two", version = "2.0", marker = "python_full_version >= '3.12'" },
    { name = "two", version = "1.0", marker = "python_full_version < '3.12'" },
]
[package.dev-dependencies]
dev = [{ name = "tester" }]
[[package]]
name = "a"
version = "1.0"
source = { registry = "https://index.example/simple" }
sdist = { url = "https://x/a.tar.gz", hash = "sha256:00aa", size = 1 }
wheels = [{ url = "https://x/a.whl", hash = "sha256:00bb", size = 1 }]
[package.optional-dependencies]
fast = [{ name = "speed" }]
[[package]]
name = "speed"
version = "3"
source = { registry = "https://index.example/simple" }
[[package]]
name = "two"
version = "1.0"
source = { registry = "https://index.example/simple" }
[[package]]
name = "two"
version = "2.0"
source = { registry = "https://index.example/simple" }
[[package]]
name = "tester"
version = "1"
source = { registry = "https://index.example/simple" }
[[package]]
name = "win"
version = "1"
source = { registry = "https://index.example/simple" }
"""


def test_a_uv_lock_gives_what_this_machine_needs_with_its_hashes() -> None:
    markers = MARKERS | {"python_full_version": "3.12.1"}
    locked = packages_of("uv.lock", UV_LOCK, markers, lambda _: "")
    assert locked.lines == ("a==1.0 --hash=sha256:00aa --hash=sha256:00bb", "speed==3", "two==2.0")
    older = packages_of("uv.lock[dev]", UV_LOCK, MARKERS | {"python_full_version": "3.11.1"}, lambda _: "")
    assert older.lines[1:] == ("speed==3", "tester==1", "two==1.0")
    with pytest.raises(BadRequirements, match="place of its own"):
        of("uv.lock", UV_LOCK.replace('{ registry = "https://index.example/simple" }', '{ git = "https://x" }'))


PYLOCK = """
lock-version = "1.0"
requires-python = ">=3.10"
extras = ["train"]
[[packages]]
name = "A"
version = "1.0"
wheels = [{ name = "a.whl", url = "https://x/a.whl", hashes = { sha256 = "aa" } }]
[[packages]]
name = "torch"
version = "2.0"
marker = "'train' in extras"
[[packages]]
name = "win"
version = "1"
marker = "sys_platform == 'win32'"
[[packages]]
name = "here"
directory = { path = "." }
"""


def test_a_pylock_gives_what_this_machine_needs_with_its_hashes() -> None:
    assert of("pylock.toml", PYLOCK).lines == ("a==1.0 --hash=sha256:aa",)
    assert of("pylock.gpu.toml[train]", PYLOCK).lines == ("a==1.0 --hash=sha256:aa", "torch==2.0")
    assert python_wanted("pylock.toml", PYLOCK) == ">=3.10"


def test_extras_are_written_behind_the_file() -> None:
    assert split_extras("a/pyproject.toml[Dev, train]") == ("a/pyproject.toml", ("dev", "train"))
    assert split_extras("requirements.txt") == ("requirements.txt", ())
