"""Images built from a Dockerfile of the workspace: once for the same content, and behind walls of their own.

The key of an image is the hash of all that goes in: the Dockerfile, the files that its ignore file leaves of the
workspace, the build arguments, the ids of the images that it builds upon, and the team. The build sees a copy of
exactly those files. It has a store of its team's own, whose layers later builds of the team go on from, and reads no
other: images to build upon are handed in as files, and what was built comes out so, and is then an image of the
node's like one that was fetched, for this team alone. One build of a team runs at a time.

    <team>/store/      podman's, written by the team's builds alone; forgotten as a whole when it grows too large
    <team>/bases/      marks: the ids of the images that were handed in
    <team>/work-*/     of one build: context, bases, image; gone with it
    <team>/building    a build writes to the store: one that did not end by itself takes the store with it
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from libs.common.contracts.messages import Container
from libs.common.image_names import OWN_PREFIX
from services.executor.adapters.environments.building import size_of
from services.executor.adapters.environments.toolbox import AsBuilder, Tell, Tool, Toolbox, ToolFailed, ToolStopped
from services.executor.adapters.runtimes.build_sandbox import RANGE, STORE_VARIABLE
from services.executor.adapters.runtimes.images import Asker, ImageRefused, Images, Walls
from services.executor.adapters.workspaces.transfer import remove_tree
from services.executor.domain.dockerfiles import (
    DEFAULT_NAMES,
    MAX_DOCKERFILE_BYTES,
    BadDockerfile,
    Ignored,
    credentials_problem,
    images_in,
    local_name,
)
from services.executor.domain.images import LOCAL, registry_of
from services.executor.domain.network import Network

BUILD_LIMIT_S = 3600.0
# What the layers of one team may take; beyond it they are forgotten together.
STORE_BYTES = 20_000_000_000
RESERVE_SHARE = 0.1
# The first user of the first team's range, and how many teams have one of their own.
FIRST_UID, RANGES = 30_720 * RANGE, 30_000
_CHUNK_BYTES = 1 << 20
_IMAGE_ID = re.compile(r"sha256:([0-9a-f]{64})")
_SCRIPT = """
out=$1 context=$2 bases=$3; shift 3
podman() { command podman --events-backend=none --cgroup-manager=cgroupfs "$@"; }
while [ "$1" != -- ]; do
  podman image exists "$1" || podman pull --quiet "dir:$2" >/dev/null
  podman tag "$1" "$3"; shift 3
done; shift
set -- --isolation=chroot --network=host --pull=never --iidfile="$TMPDIR/id" "$@"
podman build --file="$bases/Dockerfile" "$@" "$context"
podman push --quiet "$(cat "$TMPDIR/id")" "dir:$out/image"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOrder:
    """For which job an image is built: with its workspace, and within its limits."""

    team_uid: int
    workspace: Path
    cpu_count: float
    memory_bytes: int | None
    timeout_s: float | None
    network: Network
    tell: Tell


@dataclass(frozen=True, slots=True)
class _Context:
    """What goes in. `files` are paths of the workspace, relative to it, in order."""

    dockerfile: str
    text: str
    files: Sequence[str]
    digest: str


@dataclass(frozen=True, slots=True)
class _Build:
    """One build: what goes in, `bases` being ids by the names in the Dockerfile, and where."""

    name: str
    team_id: str
    team: Path
    work: Path
    container: Container
    context: _Context
    bases: Mapping[str, str]
    order: BuildOrder

    @property
    def uid(self) -> int:
        return FIRST_UID + self.order.team_uid % RANGES * RANGE

    @property
    def words(self) -> list[str]:
        words = ["--"]
        for name, value in sorted(self.container.build_args.items()):
            words += ["--build-arg", f"{name}={local_name(value) if value in self.bases else value}"]
        return words


class ImageBuilding:
    """Builds images on one node.

    Args:
        folder: its own.
        reserve_bytes: so much of the disk a build leaves free, at most a tenth.
    """

    def __init__(self, toolbox: Toolbox, images: Images, folder: Path, reserve_bytes: int) -> None:
        self._toolbox = toolbox
        self._images = images
        self._folder = folder
        self._reserve_bytes = reserve_bytes
        self._turns: dict[str, asyncio.Lock] = {}
        self._removing: set[asyncio.Task[None]] = set()

    def sweep(self) -> None:
        """Removes what a killed agent's builds left. Blocks; call it when the toolbox has swept."""
        for mark in self._folder.glob("*/building"):
            remove_tree(mark.parent)
        for work in self._folder.glob("*/work-*"):
            remove_tree(work)

    @asynccontextmanager
    async def prepared(self, container: Container, asker: Asker, order: BuildOrder) -> AsyncIterator[Walls]:
        """As `Images.prepared`, of an image that is built unless it is there.

        Raises:
            ImageRefused; OSError.
        """
        if container.built:
            async with self._images.built(container.built, container, asker) as walls:
                if walls:
                    order.tell("the image that ran before is here")
                    yield walls
                    return
            order.tell("the image that ran before is not on this node: it is built again")
        begun = time.monotonic()
        name = await self._present(container, asker, order, begun)
        async with self._images.built(name, container, asker) as walls:
            if walls is None:
                raise ImageRefused("the image was built, and is gone again")
            yield walls

    async def _present(self, container: Container, asker: Asker, order: BuildOrder, begun: float) -> str:
        """The name under which the engine has what is asked for."""
        await self._images.builder()
        try:
            context = await asyncio.to_thread(_read_context, order.workspace, container.dockerfile)
            wanted = images_in(context.text, container.build_args)
        except BadDockerfile as error:
            raise ImageRefused(f"{container.dockerfile} cannot be built: {error}") from error
        has_credentials = bool(container.registry_username or container.registry_password)
        if has_credentials and (problem := credentials_problem(wanted)):
            raise ImageRefused(problem)
        async with AsyncExitStack() as stack:
            bases = {}
            for image in wanted:
                bases[image] = await stack.enter_async_context(self._images.held(_base(container, image), asker))
            name = f"{OWN_PREFIX}{asker.team_id}:{_key(asker.team_id, context, container.build_args, bases)}"
            turn = self._turns.setdefault(asker.team_id, asyncio.Lock())
            if await self._is_there(name, container, asker):
                order.tell(f"{container.dockerfile} is built already, found in {_ms(begun)} ms")
                return name
            if turn.locked():
                order.tell("waiting for another build of the team")
            async with turn:
                if not await self._is_there(name, container, asker):
                    team = self._folder / asker.team_id
                    work = team / f"work-{uuid.uuid4().hex}"
                    await self._build(_Build(name, asker.team_id, team, work, container, context, bases, order))
                    order.tell(f"built {container.dockerfile} in {_ms(begun)} ms")
        return name

    async def _is_there(self, name: str, container: Container, asker: Asker) -> bool:
        async with self._images.built(name, container.model_copy(update={"user": ""}), asker) as walls:
            return walls is not None

    async def _build(self, build: _Build) -> None:
        build.order.tell(f"building {build.container.dockerfile}")
        out = build.work / "out"
        try:
            await asyncio.to_thread(_lay_out, build)
            words = await self._hand_in(build)
            await self._run(build, self._tool(build, [*words, *build.words]))
            image_id = await asyncio.to_thread(_id_of_built, out)
            await self._images.adopt(image_id, out, build.name, build.team_id)
            await asyncio.to_thread(_note_bases, build)
        finally:
            await self._remove(build.work)

    async def _hand_in(self, build: _Build) -> list[str]:
        words = []
        for image, image_id in build.bases.items():
            files = build.work / "bases" / image_id
            if not (build.team / "bases" / image_id).exists() and not files.exists():
                await self._images.export(image_id, files)
                await asyncio.to_thread(_give_tree, files, build.uid)
            words += [image_id, str(files), local_name(image)]
        return words

    def _tool(self, build: _Build, words: list[str]) -> Tool:
        store, order = build.team / "store", build.order
        out, context, bases = (build.work / name for name in ("out", "context", "bases"))
        return Tool(
            command=["/bin/sh", "-ec", _SCRIPT, "sh", str(out), str(context), str(bases), *words],
            env={STORE_VARIABLE: str(store), "BUILDAH_ISOLATION": "chroot", "_CONTAINERS_USERNS_CONFIGURED": "1"},
            writable=(store, out),
            readable=(context, bases),
            limit_s=min(order.timeout_s or BUILD_LIMIT_S, BUILD_LIMIT_S),
            check=self._disk_problem,
            builder=AsBuilder(
                first_uid=build.uid, cpu_count=order.cpu_count, memory_bytes=order.memory_bytes, network=order.network
            ),
        )

    async def _run(self, build: _Build, tool: Tool) -> None:
        """A build that did not end by itself may have left half a layer."""
        team, mark, is_whole = build.team, build.team / "building", False
        mark.touch()
        try:
            await self._toolbox.run(tool, build.order.tell)
            is_whole = True
        except ToolFailed as error:
            is_whole = True
            raise ImageRefused(f"the image cannot be built: {_reason(str(error))}") from error
        except ToolStopped as error:
            raise ImageRefused(f"the image cannot be built: {error}") from error
        finally:
            if is_whole:
                mark.unlink()
            else:
                for path in (team / "store", team / "bases", mark):
                    await self._remove(path)

    async def _remove(self, path: Path) -> None:
        """To its end, also when nobody waits for it any more."""
        removing = asyncio.create_task(asyncio.to_thread(_remove_present, path))
        self._removing.add(removing)
        removing.add_done_callback(self._removing.discard)
        await asyncio.shield(removing)

    def _disk_problem(self) -> str:
        usage = shutil.disk_usage(self._folder)
        reserve = min(self._reserve_bytes, int(usage.total * RESERVE_SHARE))
        return "the node's disk is full" if usage.free < reserve else ""


def _ms(begun: float) -> int:
    return round((time.monotonic() - begun) * 1000)


def _base(container: Container, image: str) -> Container:
    """As it is asked for: with the credentials where they are for its registry."""
    host = registry_of(image)
    if not host or image.startswith(LOCAL):
        return Container(image=image)
    username, password = container.registry_username, container.registry_password
    return Container(image=image, registry_username=username, registry_password=password)


def _key(team_id: str, context: _Context, build_args: Mapping[str, str], bases: Mapping[str, str]) -> str:
    inputs = [team_id, context.dockerfile, context.digest, sorted(build_args.items()), sorted(bases.items())]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]


def _read_context(workspace: Path, dockerfile: str) -> _Context:
    """Raises BadDockerfile."""
    name = _find_dockerfile(workspace, dockerfile)
    text = _text_of(workspace, name)
    assert text is not None, "it was found"
    ignore = _text_of(workspace, f"{name}.dockerignore") or _text_of(workspace, ".dockerignore")
    ignored = Ignored.of(ignore or _text_of(workspace, ".containerignore") or "")
    files = sorted(path for path in _walk(workspace) if not ignored.holds(path))
    total = hashlib.sha256(text.encode())
    for path in files:
        total.update(json.dumps([path, *_described(workspace / path)]).encode())
    return _Context(name, text, files, total.hexdigest())


def _find_dockerfile(workspace: Path, wanted: str) -> str:
    names = DEFAULT_NAMES if wanted == DEFAULT_NAMES[0] else (wanted,)
    found = next((name for name in names if _text_of(workspace, name) is not None), None)
    if found is None:
        raise BadDockerfile(f"the workspace has no {wanted[:200]}; was it left out by an ignore file?")
    return found


def _text_of(workspace: Path, name: str) -> str | None:
    """A file of the workspace; a link in it may not lead out of it."""
    try:
        real = (workspace / name).resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError):
        return None
    if not real.is_relative_to(workspace.resolve()) or not stat.S_ISREG(status.st_mode):
        return None
    if status.st_size > MAX_DOCKERFILE_BYTES:
        raise BadDockerfile(f"{name[:200]} has {status.st_size} bytes; {MAX_DOCKERFILE_BYTES} is the most")
    return real.read_text(encoding="utf-8", errors="replace")


def _walk(workspace: Path) -> list[str]:
    """Files, links and folders, relative; links are not followed."""
    found = []
    for folder, folders, files in os.walk(workspace):
        found += [os.path.relpath(os.path.join(folder, name), workspace) for name in (*folders, *files)]
    return found


def _described(path: Path) -> list[object]:
    status = path.lstat()
    kind = stat.S_IFMT(status.st_mode)
    if stat.S_ISLNK(kind):
        return [kind, os.readlink(path)]
    if not stat.S_ISREG(kind):
        return [kind]
    with path.open("rb") as file:
        return [kind, bool(status.st_mode & 0o100), hashlib.file_digest(file, "sha256").hexdigest()]


def _lay_out(build: _Build) -> None:
    """The folders of a build, with a copy of what goes in. All of it has one time: a copy's own would spoil layers."""
    work, workspace, context = build.work, build.order.workspace, build.context
    build.team.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (build.team, build.team / "bases", work, work / "bases", work / "context"):
        path.mkdir(mode=0o700, exist_ok=True)
    for name in context.files:
        source, target = workspace / name, work / "context" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_dir():
            target.mkdir(exist_ok=True)
        else:
            shutil.copyfile(source, target)
            target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)
    text = context.text
    for image in build.bases:
        text = text.replace(image, local_name(image))
    (work / "bases" / "Dockerfile").write_text(text)
    for path in (work / "context", work / "bases"):
        _give_tree(path, build.uid)


def _give_tree(root: Path, uid: int) -> None:
    for folder, folders, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in (*folders, *files))):
            os.chown(path, uid, uid, follow_symlinks=False)
            os.utime(path, (0, 0), follow_symlinks=False)


def _id_of_built(out: Path) -> str:
    """Believes nothing that the build left but files."""
    image = out / "image"
    for path in (image, *image.iterdir()):
        kind = stat.S_IFMT(path.lstat().st_mode)
        if kind != (stat.S_IFDIR if path == image else stat.S_IFREG):
            raise ImageRefused(f"the build left no image: {path.name[:80]!r} is no file")
    try:
        found = _IMAGE_ID.fullmatch(json.loads((image / "manifest.json").read_bytes())["config"]["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found is None:
        raise ImageRefused("the build left no image")
    return found[1]


def _note_bases(build: _Build) -> None:
    store, bases = build.team / "store", build.team / "bases"
    if size_of(store) > STORE_BYTES:
        remove_tree(store)
        remove_tree(bases)
        return
    for image_id in build.bases.values():
        (bases / image_id).touch()


def _remove_present(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        remove_tree(path)


def _reason(said: str) -> str:
    """podman's last words, and the lines before them that the step said."""
    lines = [line for line in said.splitlines() if line.strip()]
    return "\n".join(lines[-6:])
