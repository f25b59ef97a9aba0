"""Environments are built by a real installer behind real walls, from an index on this machine."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from libs.common.contracts.messages import Environment
from libs.common.ids import new_id
from libs.common.waiting import end
from services.executor.adapters.attempts import zygote
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec
from services.executor.adapters.environments.building import InstallerBuilder
from services.executor.adapters.environments.environments import Asker, EnvironmentRefused, Environments, Prepared
from services.executor.adapters.runtimes import cgroup
from tests.integration.executor.attempts import JOB_UID, eventually
from tests.integration.executor.tools import (
    ROOT,
    ToolNode,
    make_sdist,
    make_wheel,
    package_index,
    tool_node,
    web_server,
    why_no_walls,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(why_no_walls()), reason=why_no_walls() or "walls"),
]
SECRET = "canary-of-the-platform"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    make_wheel(folder, "alpha", "1.0", {"alpha.py": "import beta\nnumber = 1 + beta.number"}, "beta>=2")
    make_wheel(folder, "beta", "1.0", {"beta.py": "number = 0"})
    make_wheel(folder, "beta", "2.0", {"beta.py": "number = 41"})
    return folder


@pytest.fixture
def index(packages: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The node's own settings name an index here; what it is asked for."""
    with package_index(packages) as (port, asked):
        for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
            monkeypatch.delenv(name)
        (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = http://127.0.0.1:{port}/simple\n")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
        monkeypatch.setenv("NABLA_CANARY", SECRET)
        yield asked


@pytest.fixture
async def node() -> AsyncIterator[ToolNode]:
    async with tool_node() as found:
        yield found


def environments(node: ToolNode, installer: str = "pip") -> Environments:
    default = ROOT / ".venv-serving"
    builder = InstallerBuilder(node.toolbox, default, node.path / "cache" / "downloads", installer=installer)
    return Environments(default, node.path / "cache" / "environments", (node.path,), builder)


async def prepare(made: Environments, text: str, told: list[str] | None = None) -> Prepared:
    wanted = Environment(kind="requirements", requirements=text)
    async with made.prepared(
        wanted, Asker("te1", Path("/nowhere"), (told if told is not None else []).append)
    ) as found:
        return found


def run(found: Prepared, code: str) -> str:
    command = [f"{found.prefix}/bin/python", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


async def test_packages_of_the_index_become_an_environment_that_is_written_down(
    node: ToolNode, index: list[str]
) -> None:
    made, told = environments(node), list[str]()
    found = await prepare(made, "alpha", told)
    assert run(found, "import alpha; print(alpha.number)") == "42"
    assert found.record
    lines = found.record.read_text().splitlines()
    assert lines[0].startswith(f"# python: {sys.version_info.major}.")
    assert [line.split(" --hash=sha256:")[0] for line in lines[1:]] == ["alpha==1.0", "beta==2.0"]
    assert all(len(line.split(":")[-1]) == 64 for line in lines[1:])
    assert any("Installing collected packages" in line for line in told)
    assert not node.leftovers()

    before = len(index)
    assert await prepare(made, "Alpha") == found
    assert len(index) == before, "it was installed again"

    again = await prepare(made, found.record.read_text())
    assert again.prefix != found.prefix
    assert again.record
    assert again.record.read_text() == found.record.read_text()


async def test_uv_builds_the_same(node: ToolNode, index: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the uv of infra/locks/dev.txt, which is beside the Python of the tests and need not be on the PATH."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shutil.which("uv"), "uv comes with infra/locks/dev.txt: python3 infra/setup.py test installs it"
    found = await prepare(environments(node, "uv"), "alpha")
    assert run(found, "import alpha; print(alpha.number)") == "42"
    assert found.record
    pinned = [line.split(" ")[0] for line in found.record.read_text().splitlines() if "==" in line]
    assert pinned == ["alpha==1.0", "beta==2.0"]


async def test_what_cannot_be_had_is_refused_in_the_installers_words(node: ToolNode, index: list[str]) -> None:
    for text, why in (("gamma==3", "gamma==3"), ("alpha\nbeta<2", "ResolutionImpossible|conflict")):
        with pytest.raises(EnvironmentRefused, match=why):
            await prepare(environments(node), text)
    wrong = "beta==2.0 --hash=sha256:" + "0" * 64
    with pytest.raises(EnvironmentRefused, match=r"(?i)hash"):
        await prepare(environments(node), wrong)
    assert not node.leftovers()


SPY = """
import os, socket, sys
def tried(work):
    try:
        return repr(work())
    except BaseException as error:
        return type(error).__name__
print("uid", os.getuid() and "ordinary")
print("environment", "{secret}" in str(dict(os.environ)), "{secret}" in open("/proc/self/environ").read())
print("node", tried(lambda: len(os.listdir("{node}/cache/environments"))), tried(lambda: open("{private}").read()))
print("loopback", tried(lambda: socket.create_connection(("127.0.0.1", {port}), 3)))
print("processes", len([p for p in os.listdir("/proc") if p.isdigit()]) < 30)
proxy = socket.create_connection(("127.0.0.1", 3128), 5)
proxy.sendall(b"CONNECT 127.0.0.1:{port} HTTP/1.1\\r\\n\\r\\n")
print("gate", proxy.recv(100).split(b"\\r\\n")[0])
sys.stdout.flush()
raise SystemExit("this build fails, to have its words shown")
"""


async def test_the_code_of_a_package_sees_and_reaches_nothing_of_the_platform(
    node: ToolNode, packages: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    private = node.path / "private"
    private.write_text(SECRET)
    private.chmod(0o600)
    with web_server(tmp_path) as (port, asked):
        code = SPY.format(secret=SECRET, node=node.path, private=private, port=port)
        make_sdist(packages, "spy", code)
        request.getfixturevalue("index")
        with pytest.raises(EnvironmentRefused) as refused:
            await prepare(environments(node), "spy")
        assert asked == []
    said = str(refused.value)
    for line in (
        "uid ordinary",
        "environment False False",
        "node 1 FileNotFoundError",
        "loopback ConnectionRefusedError",
        "processes True",
        "gate b'HTTP/1.1 403 Forbidden'",
        f"127.0.0.1:{port} is not among the places",
    ):
        assert line in said
    assert SECRET not in said


@pytest.mark.full
async def test_a_package_without_a_wheel_is_built(
    node: ToolNode, packages: Path, request: pytest.FixtureRequest
) -> None:
    make_sdist(packages, "honest", "")
    request.getfixturevalue("index")
    found = await prepare(environments(node), "honest")
    assert run(found, "import honest; print(honest.built)") == "True"


LIAR = """
import glob, os
for prefix in glob.glob("{node}/cache/environments/*"):
    for name in {names}:
        if not os.path.lexists(os.path.join(prefix, name)):
            os.symlink("{target}", os.path.join(prefix, name))
"""


async def test_links_that_a_build_leaves_lead_the_platform_nowhere(
    node: ToolNode, packages: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    target = tmp_path / "target"
    target.write_text(SECRET)
    target.chmod(0o666)
    for name, links in (("liar", (".complete", ".kept.json")), ("thief", ("nabla-environment.txt",))):
        make_sdist(packages, name, LIAR.format(node=node.path, names=links, target=target))
    request.getfixturevalue("index")
    found = await prepare(environments(node), "liar")
    assert found.record
    assert "liar==1.0" in found.record.read_text()
    with pytest.raises(EnvironmentRefused, match="does not say what it installed"):
        await prepare(environments(node), "thief")
    assert target.read_text() == SECRET


@pytest.mark.full
async def test_without_walls_no_package_is_built(packages: Path, request: pytest.FixtureRequest) -> None:
    make_sdist(packages, "honest", "")
    request.getfixturevalue("index")
    async with tool_node("process") as node:
        with pytest.raises(EnvironmentRefused, match="honest"):
            await prepare(environments(node), "honest")
        found = await prepare(environments(node), "beta")
        assert found.record
        assert "beta==2.0" in found.record.read_text()


async def test_a_build_that_nobody_wants_any_more_ends_with_all_of_it(
    node: ToolNode, packages: Path, request: pytest.FixtureRequest
) -> None:
    make_sdist(packages, "slow", "import time; print('slowly', flush=True); time.sleep(600)")
    request.getfixturevalue("index")
    told: list[str] = []
    building = asyncio.create_task(prepare(environments(node), "slow", told))
    try:
        async with asyncio.timeout(60):
            while not any("slow" in line for line in told):
                await asyncio.sleep(0.05)
    finally:
        await end([building])
    assert not node.leftovers()


async def test_what_an_agent_left_running_is_ended_by_the_next(node: ToolNode) -> None:
    spec = AttemptSpec(attempt_id=new_id("attempt"), job_id="tool", command=["sleep", "600"], run_as_uid=JOB_UID)
    folder = AttemptFolder.create(node.path / "tools", spec)
    await asyncio.to_thread(zygote.start_attempt, node.socket, folder.path)
    started = await asyncio.to_thread(eventually, folder.read_started, "the start of the tool")
    await asyncio.to_thread(node.toolbox.sweep)
    assert [path for path in cgroup.folders_of(folder.path.name) if path.exists()] == []
    await asyncio.to_thread(eventually, lambda: not Path(f"/proc/{started.pid}").exists(), "the end of the tool")
    assert not node.leftovers()
