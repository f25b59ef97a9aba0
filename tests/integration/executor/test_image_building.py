"""Images that are built from a Dockerfile of the workspace, by the node agent with a real podman."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from libs.common.contracts.messages import Container, Execution, Resources
from services.executor.adapters.environments import image_building
from services.executor.adapters.runtimes import cgroup
from services.executor.adapters.runtimes.engine import Engine
from services.executor.ports import AgentConfig, StartOrder
from tests.integration.executor.runtimes import podman, why_no_podman
from tests.integration.executor.test_images import only_here
from tests.integration.executor.test_node_agent import config, ended, order, running, texts
from tests.integration.executor.world import TEAM, Neighbours, until
from tests.support.images import podman_image
from tests.support.registry import PASSWORD, USER, running_registry

__all__ = ["config"]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(why_no_podman()), reason=why_no_podman() or "there is one"),
    pytest.mark.skipif(os.geteuid() != 0, reason="images are built where the platform is root"),
]
OTHER_TEAM = "t0other"
# A second process begins from nothing, on a machine that may be busy.
START_S = 110.0


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """An image that is present on the node."""
    with podman_image(engine().command) as name:
        yield name


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    """What the tests built is nobody's afterwards."""
    before = own_images()
    yield
    if made := own_images() - before:
        subprocess.run([*engine().command, "rmi", "--force", *made], check=True, capture_output=True)


def engine() -> Engine:
    found = podman()
    assert isinstance(found, Engine)
    return found


def own_images() -> set[str]:
    words = ["images", "--quiet", "--no-trunc", "--filter", f"reference=localhost/nabla-own-{TEAM}"]
    words_out = subprocess.run([*engine().command, *words], check=True, capture_output=True, text=True).stdout
    return set(words_out.split())


def builds_of(config: AgentConfig) -> Path:
    return Path(config.node_dir) / "cache" / "builds"


def leftovers(config: AgentConfig) -> list[str]:
    """What builds left: work, marks, working containers, mounts, processes, folders of tools."""
    builds = builds_of(config)
    found = [str(path) for path in (*builds.glob("*/work-*"), *builds.glob("*/building"))]
    for listed in builds.glob("*/store/overlay-containers/containers.json"):
        found += [str(each) for each in json.loads(listed.read_text() or "[]")]
    found += [str(path) for path in Path(config.node_dir, "tools", "attempts").glob("*")]
    found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(builds) in line]
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path("/proc", name, "cmdline").read_bytes()
        except OSError:
            continue
        if str(builds).encode() in line:
            found.append(f"process {name}: {line!r}")
    return found


def built(neighbours: Neighbours, files: Mapping[str, bytes], *command: str, **fields: object) -> StartOrder:
    container = {name: fields.pop(name) for name in list(fields) if name in Container.model_fields}
    fileset = neighbours.put_workspace(dict(files))
    made = Container(**{"dockerfile": "Dockerfile"} | container)  # type: ignore[arg-type]
    return order(*command, workspace_id=fileset, container=made, **fields)


async def ran(config: AgentConfig, neighbours: Neighbours, asked: StartOrder) -> tuple[Execution, list[str]]:
    async with running(config) as agent:
        await agent.start(asked)
        end = await ended(agent, asked.attempt_id)
    return end, [line.text for line in await neighbours.log(asked.job_id)]


async def test_a_dockerfile_is_built_once_for_the_same_content(
    config: AgentConfig, neighbours: Neighbours, base: str
) -> None:
    text = f"FROM {base}\nARG WHO\nCOPY given /given\nRUN echo building for $WHO; echo $WHO > /who; id -u\n".encode()
    files = {"Dockerfile": text, "given": b"content\n", ".dockerignore": b"notes\n.dockerignore\n", "notes": b"1"}
    args = {"build_args": {"WHO": "tests"}}
    async with running(config) as agent:
        first = built(neighbours, files, "cat /given /who; id -u", **args)
        await agent.start(first)
        end = await ended(agent, first.attempt_id)
        said = [line.text for line in await neighbours.log(first.job_id)]
        assert (end.reason, end.exit_code, end.isolation) == ("exited", 0, "podman"), said
        assert await texts(neighbours, first) == ["content", "tests", str(first.team_uid)]
        assert "image: building for tests" in said
        assert any(line.startswith("image: built Dockerfile in ") for line in said), said

        # What is ignored changes nothing; what goes in does.
        same = built(neighbours, files | {"notes": b"2"}, "cat /given", **args)
        await agent.start(same)
        again = await ended(agent, same.attempt_id)
        said = [line.text for line in await neighbours.log(same.job_id)]
        assert any(line.startswith("image: Dockerfile is built already, found in ") for line in said), said
        assert not any("STEP" in line for line in said)
        assert again.origin["image"] == end.origin["image"]

        other = built(neighbours, files | {"given": b"other\n"}, "cat /given", **args)
        await agent.start(other)
        changed = await ended(agent, other.attempt_id)
        assert await texts(neighbours, other) == ["other"]
        assert changed.origin["image"] != end.origin["image"]

        # The same again by its id, whatever the workspace is now.
        exact = built(neighbours, {"Dockerfile": b"FROM scratch"}, "cat /given", built=end.origin["image"])
        await agent.start(exact)
        assert (await ended(agent, exact.attempt_id)).origin["image"] == end.origin["image"]
        assert await texts(neighbours, exact) == ["content"]
    assert leftovers(config) == []


async def test_an_image_can_begin_with_nothing_but_a_root_of_the_workspace_s(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    script = b"#!/root/busy\n"
    static = Path("/usr/bin/tini-static")
    if not static.exists():
        static = Path("/usr/libexec/podman/catatonit")
    files = {"docker/Dev": b"FROM scratch\nCOPY root/ /\n", "root/etc/x": script, "root/init": static.read_bytes()}
    end, said = await ran(config, neighbours, built(neighbours, files, "/init", "-V", dockerfile="docker/Dev"))
    assert end.isolation == "podman", said
    assert any("STEP 2/2: COPY root/ /" in line for line in said), said
    assert leftovers(config) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("FROM BASE\nRUN echo the reason is here >&2; exit 7", "the reason is here"),
        ("FROM localhost/not/there:1", "there is no image localhost/not/there:1"),
        ("RUN true", "it has no FROM"),
        ("FROM BASE\nCOPY missing /x", "missing"),
        ("FROM BASE\nCOPY ../../../../../../etc/shadow /x", "shadow"),
    ],
)
async def test_a_build_that_fails_is_the_attempts_end_with_the_reason(
    config: AgentConfig, neighbours: Neighbours, base: str, text: str, why: str
) -> None:
    asked = built(neighbours, {"Dockerfile": text.replace("BASE", base).encode()}, "true")
    end, said = await ran(config, neighbours, asked)
    assert (end.reason, end.exit_code) == ("refused", None), said
    assert why in end.detail
    assert leftovers(config) == []


async def test_a_step_reaches_nothing_of_the_node_and_is_root_of_nothing_outside(
    config: AgentConfig, neighbours: Neighbours, base: str
) -> None:
    """Neither files of the host, nor the store of another team, nor the platform's ports, nor its capabilities."""
    canary = Path(config.node_dir).parent / "canary"
    canary.write_text("of the node")
    other = builds_of(config) / OTHER_TEAM / "store"
    other.mkdir(parents=True)
    (other / "canary").write_text("of another team")
    port = config.front_door.rsplit(":", 1)[1]
    knock = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
    look = [
        f"! cat {canary} {other}/canary /etc/shadow",
        f'! python3 -c "{knock}"',
        "! ls /var/lib/containers /proc/1/root/root",
        "! mount -t tmpfs none /mnt",
        "cat /proc/self/uid_map",
        "grep CapEff /proc/self/status",
        "ls -ld /etc/passwd",
    ]
    steps = "\n".join(f"RUN {line}" for line in look)
    asked = built(neighbours, {"Dockerfile": f"FROM {base}\n{steps}\n".encode()}, "true", network="platform")
    end, said = await ran(config, neighbours, asked)
    assert end.exit_code == 0, said
    maps = [line.split()[1:] for line in said if line.startswith("image: ") and line.endswith(" 65536")]
    assert maps
    assert int(maps[0][1]) > 1_000_000_000
    rights = next(int(line.split()[-1], 16) for line in said if line.startswith("image: CapEff:"))
    assert not rights & (1 << 21 | 1 << 12 | 1 << 19 | 1 << 16)  # SYS_ADMIN, NET_ADMIN, SYS_PTRACE, SYS_MODULE
    assert not any("of the node" in line or "of another team" in line for line in said)


async def test_a_build_has_the_limits_of_its_job(config: AgentConfig, neighbours: Neighbours, base: str) -> None:
    eat = f"FROM {base}\nRUN python3 -c 'x = bytearray(400_000_000); print(len(x))'\n".encode()
    asked = built(neighbours, {"Dockerfile": eat}, "true", resources=Resources(memory_bytes=200_000_000))
    end, said = await ran(config, neighbours, asked)
    assert end.reason == "refused", said
    assert "200000000 bytes of memory" in end.detail
    slow = built(neighbours, {"Dockerfile": f"FROM {base}\nRUN sleep 1000\n".encode()}, "true", timeout_s=3.0)
    end, said = await ran(config, neighbours, slow)
    assert end.reason == "refused", said
    assert "longer than its limit of 3 s" in end.detail
    assert leftovers(config) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_a_build_that_is_cut_leaves_nothing(
    config: AgentConfig, neighbours: Neighbours, base: str, how: str
) -> None:
    text = f"FROM {base}\nRUN echo it runs; (setsid sleep 1000 &); sleep 1000\n".encode()
    asked = built(neighbours, {"Dockerfile": text}, "true")
    if how == "killed":
        await _killed_while_it_builds(config, asked)
        assert leftovers(config), "the build was over before the agent was killed"
        killed = [path.name for path in Path(config.node_dir, "tools", "attempts").iterdir()]
        async with running(config) as agent:
            await until(lambda: _is_building(config), START_S)  # the next agent begins with it again
            await agent.stop(asked.attempt_id, 0.0, "enough")
            await ended(agent, asked.attempt_id)
        assert killed
        assert [path for name in killed for path in cgroup.folders_of(name) if path.exists()] == []
    else:
        async with running(config) as agent:
            await agent.start(asked)
            await until(lambda: _is_building(config))
            await agent.stop(asked.attempt_id, 0.0, "enough")
            end = await ended(agent, asked.attempt_id)
            assert (end.reason, end.detail) == ("stopped", "enough")
    assert leftovers(config) == []
    assert not list(builds_of(config).glob("*/store"))


async def _is_building(config: AgentConfig) -> bool:
    return any("sleep" in line for line in leftovers(config)) or bool(_sleepers(config))


def _sleepers(config: AgentConfig) -> list[str]:
    """Steps that run: in a user namespace of a build's, and asleep."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path("/proc", name, "cmdline").read_bytes()
            first = int(Path("/proc", name, "uid_map").read_text().split()[1])
        except (OSError, IndexError):
            continue
        if line.startswith(b"sleep\x001000") and first > 1_000_000_000:
            found.append(name)
    return found


async def _killed_while_it_builds(config: AgentConfig, asked: StartOrder) -> None:
    """An agent in a process of its own, which is killed."""
    code = (
        "import asyncio, pickle, sys\n"
        "from tests.integration.executor.test_node_agent import running\n"
        "async def main():\n"
        "    config, asked = pickle.load(open(sys.argv[1], 'rb'))\n"
        "    async with running(config) as agent:\n"
        "        await agent.start(asked)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    told = Path(config.node_dir).parent / "told"
    told.write_bytes(pickle.dumps((config, asked)))
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(told))
    try:
        await until(lambda: _is_building(config), START_S)
    finally:
        process.kill()
        await process.wait()


async def test_built_images_and_their_layers_are_kept_within_bounds(
    config: AgentConfig, neighbours: Neighbours, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_building, "STORE_BYTES", 1)
    made = []
    async with running(replace(config, images_bytes=1)) as agent:
        for number in range(2):
            asked = built(neighbours, {"Dockerfile": f"FROM {base}\nENV N={number}\n".encode()}, "true")
            await agent.start(asked)
            made.append((await ended(agent, asked.attempt_id)).origin["image"])
    there = {image.removeprefix("sha256:") for image in own_images()}
    assert made[1] in there
    assert made[0] not in there
    assert not list(builds_of(config).glob("*/store"))


async def test_an_image_to_build_upon_is_fetched_with_the_jobs_credentials(
    config: AgentConfig, neighbours: Neighbours
) -> None:
    with running_registry() as registry:
        name = only_here(engine(), registry, "team/base:1", "of the registry")
        files = {"Dockerfile": f"FROM {name}\nCOPY more /etc/more\n".encode(), "more": b"x"}
        try:
            refused = built(neighbours, files, "true")
            end, said = await ran(config, neighbours, refused)
            assert end.reason == "refused"
            assert "does not give out" in end.detail
            known = built(neighbours, files, "true", registry_username=USER, registry_password=PASSWORD)
            end, said = await ran(config, neighbours, known)
            assert "image" in end.origin, said
            assert not any(PASSWORD in line for line in said)
        finally:
            subprocess.run([*engine().command, "rmi", "--force", "--ignore", name], check=True, capture_output=True)
    assert leftovers(config) == []
