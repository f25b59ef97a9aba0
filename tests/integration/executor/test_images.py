"""How a node gets its images, with a real engine and a real registry: who may have which, and what is kept."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from libs.common.contracts.messages import Container
from services.executor.adapters.attempts.attempt_folder import Bind, Image
from services.executor.adapters.runtimes.engine import Engine, NoEngine, remove_leftovers
from services.executor.adapters.runtimes.images import Asker, ImageRefused, Images, Walls
from tests.integration.executor.attempts import Node, running_node
from tests.integration.executor.runtimes import podman, why_no_podman
from tests.support.images import APP_UID, podman_image, tiny_image, unpacked_image
from tests.support.registry import PASSWORD, USER, Registry, running_registry

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(why_no_podman()), reason=why_no_podman() or "there is one"),
    pytest.mark.skipif(os.geteuid() != 0, reason="images are the node's, which root alone may change"),
]
UID = 61_001


@pytest.fixture(scope="module")
def engine() -> Engine:
    found = podman()
    assert isinstance(found, Engine)
    return found


@pytest.fixture(scope="module")
def local(engine: Engine) -> Iterator[str]:
    with podman_image(engine.command) as name:
        yield name


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with running_registry() as registry:
        yield registry


@pytest.fixture
def cache() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nabla-images-") as folder:
        yield Path(folder)


@pytest.fixture
def node(engine: Engine) -> Iterator[Node]:
    with running_node() as node:
        yield node


def images_in(cache: Path, engine: Engine | NoEngine, **fields: object) -> Images:
    return Images(lambda: engine, cache / "unpacked", cache / "records", **fields)  # type: ignore[arg-type]


def asker(team: str = "t0a", told: list[str] | None = None) -> Asker:
    return Asker(team, UID, (), (told if told is not None else []).append)


async def got(images: Images, container: Container, who: Asker | None = None) -> Walls:
    async with images.prepared(container, who or asker()) as walls:
        return walls


def only_here(engine: Engine, registry: Registry, name: str, content: str) -> str:
    """A small image that only the registry has."""
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder, "tar")
        Path(folder, "etc").mkdir()
        Path(folder, "etc", "content").write_text(content)
        subprocess.run(["tar", "-C", folder, "-cf", str(tar), "etc"], check=True)
        made = f"localhost/nabla-test-{os.getpid()}:source"
        subprocess.run([*engine.command, "import", "-q", str(tar), made], check=True, capture_output=True)
    asked = registry.put(engine.command, made, name)
    subprocess.run([*engine.command, "rmi", "-f", made], check=True, capture_output=True)
    return asked


def is_there(engine: Engine, image: str) -> bool:
    return subprocess.run([*engine.command, "image", "exists", image], check=False).returncode == 0


def forget(engine: Engine, *images: str) -> None:
    subprocess.run([*engine.command, "rmi", "--force", "--ignore", *images], check=True, capture_output=True)


async def test_an_image_of_the_node_is_taken_as_it_is(cache: Path, engine: Engine, local: str) -> None:
    told: list[str] = []
    images = images_in(cache, engine)
    walls = await got(images, Container(image=local), asker(told=told))
    assert (walls.isolation, walls.image.has_shell, walls.image.uid, told) == ("podman", True, None, [])
    assert images.runtimes == ("podman",)


def test_what_a_killed_probe_left_is_taken_away_and_no_other_container(cache: Path, engine: Engine) -> None:
    alone = (*engine.command, "--root", str(cache / "store"), "--runroot", str(cache / "run"))
    root, left, young = cache / "root", cache / "nabla-podman-left", cache / "nabla-podman-young"
    for folder in (root, left, young):
        folder.mkdir()
    for name, label in (("left", "--label=org.nabla.probe"), ("other", "--label=own")):
        words = [*alone, "create", f"--name={name}", label, "--network=none", "--rootfs", str(root), "true"]
        subprocess.run(words, check=True, capture_output=True)
    os.utime(left, (0, 0))
    remove_leftovers(alone, cache, over_s=60)
    assert (left.exists(), young.exists()) == (False, True)
    remove_leftovers(alone, cache, over_s=-60)  # made a moment ago, it is old enough
    listed = subprocess.run([*alone, "ps", "--all", "--format={{.Names}}"], check=True, capture_output=True, text=True)
    assert listed.stdout.split() == ["other"]


async def test_a_known_image_costs_no_question_to_the_engine(cache: Path, engine: Engine) -> None:
    # A store of its own: any image that comes or goes makes the engine be asked again.
    command = (*engine.command, "--root", str(cache / "store"), "--runroot", str(cache / "run"))
    alone = replace(engine, command=command)
    with podman_image(alone.command) as name:
        images = images_in(cache, alone)
        first = await got(images, Container(image=name))
        images._engine = replace(alone, command=("/bin/false",))
        async with images.prepared(Container(image=name), asker()) as again:
            assert again.image.image == first.image.image


async def test_a_password_gets_an_image_and_leaves_no_trace(cache: Path, engine: Engine, registry: Registry) -> None:
    name, told = only_here(engine, registry, "team/private:1", "secret"), list[str]()
    images = images_in(cache, engine)
    known = Container(image=name, registry_username=USER, registry_password=PASSWORD)
    try:
        walls = await got(images, known, asker(told=told))
        assert told[0] == f"pulling {name}"
        assert any(line.startswith("Copying blob") for line in told)
        assert told[-1].startswith(f"pulled {name} in ")
        assert [path.name for path in (cache / "records").iterdir()] == [f"{walls.image.image}.json"]
        assert PASSWORD not in (cache / "records" / f"{walls.image.image}.json").read_text()
        # The same team needs no password as long as the image is kept.
        assert (await got(images, Container(image=name))).image.image == walls.image.image
    finally:
        forget(engine, name)


@pytest.mark.parametrize("by", ["name", "id"])
async def test_what_one_team_may_have_another_must_ask_for(
    cache: Path, engine: Engine, registry: Registry, by: str
) -> None:
    name = only_here(engine, registry, "team/private:2", "secret")
    known = Container(image=name, registry_username=USER, registry_password=PASSWORD)
    try:
        walls = await got(images_in(cache, engine), known)
        wanted = name if by == "name" else walls.image.image[:12]
        with pytest.raises(ImageRefused) as refused:
            await got(images_in(cache, engine), Container(image=wanted), asker("t0b"))
        assert ("does not give out" if by == "name" else "an id of one machine") in str(refused.value)
        with pytest.raises(ImageRefused, match="check these credentials"):
            await got(images_in(cache, engine), known.model_copy(update={"registry_password": "x"}), asker("t0b"))
        assert (await got(images_in(cache, engine), known, asker("t0b"))).image.image == walls.image.image
    finally:
        forget(engine, name)


async def test_two_who_ask_at_once_fetch_it_once(cache: Path, engine: Engine, registry: Registry) -> None:
    name = only_here(engine, registry, "team/private:3", "shared")
    images = images_in(cache, engine)
    known = Container(image=name, registry_username=USER, registry_password=PASSWORD)
    registry.asked.clear()
    try:
        walls = await asyncio.gather(*(got(images, known) for _ in range(4)))
        assert len({each.image.image for each in walls}) == 1
        assert sum("/blobs/" in path for path in registry.asked) == len(set(registry.asked) - {"/v2/"}) - 1
    finally:
        forget(engine, name)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ("localhost/not/there:1", "no image localhost/not/there:1 on this node"),
        ("dir:/etc", "is not the name of an image"),
        ("docker-daemon:image", "other means than from a registry"),
        ("--volume=/:/host", "is not the name of an image"),
        ("localhost/nabla-own-t0b:1", "belongs to the platform"),
    ],
)
async def test_what_cannot_be_asked_for_is_refused_with_the_reason(
    cache: Path, engine: Engine, image: str, why: str
) -> None:
    with pytest.raises(ImageRefused, match=why):
        await got(images_in(cache, engine), Container(image=image))


async def test_an_image_that_the_registry_has_not_is_refused(cache: Path, engine: Engine, registry: Registry) -> None:
    name = f"{registry.host}/no/such:1"
    with pytest.raises(ImageRefused, match=f"there is no image {name}"):
        await got(images_in(cache, engine), Container(image=name, registry_username=USER, registry_password=PASSWORD))


async def test_the_longest_unused_make_room(cache: Path, engine: Engine, registry: Registry, local: str) -> None:
    names = [only_here(engine, registry, f"team/many:{n}", f"{n}" * 100_000) for n in range(3)]
    images = images_in(cache, engine, cache_bytes=250_000)
    credentials = {"registry_username": USER, "registry_password": PASSWORD}
    try:
        await got(images, Container(image=local))  # an administrator's: it does not count, and stays
        for name in names[:2]:
            await got(images, Container(image=name, **credentials))
        async with images.prepared(Container(image=names[0], **credentials), asker()):
            await got(images, Container(image=names[2], **credentials))
        assert [is_there(engine, name) for name in (*names, local)] == [True, False, True, True]
    finally:
        forget(engine, *names)


async def test_a_user_of_the_image_is_found_by_name(cache: Path, engine: Engine, local: str) -> None:
    images = images_in(cache, engine)
    found = [(await got(images, Container(image=local, user=user))).image for user in ("app", "root", "0:7", "5")]
    assert [(image.uid, image.gid) for image in found] == [(APP_UID, APP_UID), (0, 0), (0, 7), (5, 0)]
    with pytest.raises(ImageRefused, match="no user 'nobody-here'"):
        await got(images, Container(image=local, user="nobody-here"))
    with pytest.raises(ImageRefused, match=f"below {UID}"):
        await got(images, Container(image=local, user="65534"))


@pytest.mark.parametrize(("user", "inside"), [("", "61001 61001"), ("root", "0 0"), ("app", f"{APP_UID} {APP_UID}")])
async def test_whoever_a_job_is_inside_outside_it_is_its_team(
    cache: Path, engine: Engine, local: str, node: Node, user: str, inside: str
) -> None:
    async with images_in(cache, engine).prepared(Container(image=local, user=user), asker()) as walls:
        storage = node.path / "storage"
        storage.mkdir(mode=0o700)
        os.chown(storage, UID, UID)
        look = 'echo "$(id -u) $(id -g)"; touch made /storage/made; ls -lnd /etc/passwd | cut -d " " -f 3; '
        look += "id -G; cat /etc/shadow /proc/1/environ 2>&1 >/dev/null; setpriv --reuid 0 true 2>&1 >/dev/null; exit 5"
        ended = await asyncio.to_thread(
            node.run,
            look,
            isolation="podman",
            image=walls.image,
            run_as_uid=UID,
            binds_rw=[Bind(str(storage), "/storage")],
        )
    assert (ended.code, ended.lines("o")[:2]) == (5, [inside, "0"]), ended.text
    assert {(ended.folder.workspace / "made").stat().st_uid, (storage / "made").stat().st_uid} == {UID}


def test_a_job_gets_the_devices_that_are_its_own_and_no_others(local: str, engine: Engine, node: Node) -> None:
    """By CDI, with devices that every machine has in place of GPUs."""
    kind = f"nabla.test/device-{os.getpid()}"
    devices = [
        {"name": name, "containerEdits": {"deviceNodes": [{"path": path}], "env": [f"DEVICE_{name}=given"]}}
        for name, path in (("0", "/dev/kmsg"), ("1", "/dev/mem"))
    ]
    spec = Path("/var/run/cdi", f"nabla-test-{os.getpid()}.json")
    spec.parent.mkdir(exist_ok=True)
    spec.write_text(json.dumps({"cdiVersion": "0.3.0", "kind": kind, "devices": devices}))
    command, options = list(engine.command), list(engine.options)
    image = Image(image=local, engine=command, options=options, devices=[f"{kind}=0"])
    try:
        ended = node.run("ls /dev/kmsg /dev/mem; env | grep ^DEVICE", isolation="podman", image=image, run_as_uid=UID)
    finally:
        spec.unlink()
    assert ended.lines("o") == ["/dev/kmsg", "DEVICE_0=given"], ended.text


async def test_without_an_engine_an_unpacked_image_is_run_or_the_way_told(cache: Path, node: Node) -> None:
    missing = NoEngine("podman is not installed", "apt-get install podman")
    images = images_in(cache, missing)
    with pytest.raises(ImageRefused, match=r"podman is not installed.*`apt-get install podman` on the node, or unpack"):
        await got(images, Container(image="debian:12"))
    root = unpacked_image(cache / "unpacked" / "debian_12")
    walls = await got(images, Container(image="debian:12"))
    assert (walls.isolation, walls.image.image, images.runtimes) == ("bwrap", str(root), ("bwrap",))
    ended = await asyncio.to_thread(node.run, "cat /etc/made-for-tests && id -un", image=walls.image, run_as_uid=UID)
    assert (ended.code, ended.lines()) == (0, ["nabla"]), ended.text


def test_the_tests_image_is_made_once() -> None:
    assert tiny_image() is tiny_image()


async def test_an_image_for_another_kind_of_machine_is_refused_with_both_named(engine: Engine, cache: Path) -> None:
    name = f"localhost/nabla-test-{os.getpid()}:foreign"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "etc").mkdir()
        tar = Path(folder, "tar")
        subprocess.run(["tar", "-C", folder, "-cf", str(tar), "etc"], check=True)
        words = ["import", "-q", "--arch=s390x", "--os=linux", str(tar), name]
        await asyncio.to_thread(subprocess.run, [*engine.command, *words], check=True, capture_output=True)
    try:
        with pytest.raises(ImageRefused, match=r"the image is for s390x, and this node is \w+: .*name an image"):
            await got(images_in(cache, engine), Container(image=name))
    finally:
        await asyncio.to_thread(subprocess.run, [*engine.command, "rmi", "-f", name], check=True, capture_output=True)
