"""Lays out what one attempt starts from: its workspace, its environment, and the spec that its shim reads.

Everything here may be begun again. What was found out on the way (the commit that a branch was, the list of what an
environment became) is in `origin.json`, for the report: with it the same can be run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from dataclasses import replace
from pathlib import Path

from libs.common.contracts.messages import Container, Environment, JobTemplate
from services.executor.adapters.agent.attempt_log import AttemptLog
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, write_durably
from services.executor.adapters.attempts.job_spec import (
    NodeFacts,
    generate_files,
    job_uid,
    network_of,
    spec_for,
    told_isolation,
    told_network,
)
from services.executor.adapters.environments.building import RECORD, write_new
from services.executor.adapters.environments.environments import Asker, EnvironmentRefused, Environments, Prepared
from services.executor.adapters.environments.image_building import BuildOrder, ImageBuilding
from services.executor.adapters.environments.toolbox import Tell
from services.executor.adapters.runtimes.images import Asker as ImageAsker
from services.executor.adapters.runtimes.images import Images, Walls
from services.executor.adapters.workspaces.sealing import NotKept, Owner, Sealing
from services.executor.adapters.workspaces.staging import Staging, StagingFailed
from services.executor.domain.execution import short_reason
from services.executor.domain.requirements import MAX_TEXT_BYTES
from services.executor.ports import StartOrder

# A long build says its newest line this often.
TELL_S = 3.0
KEEP_LIMIT_S = 30.0
BUILD_LINES = 2000
# In a built environment: the file set that keeps its list, by project.
KEPT = ".kept.json"
# What a source's version is called in an origin.
VERSION_OF = {"git": "commit", "s3": "etag"}

log = logging.getLogger(__name__)


class Preparing:
    """Prepares one attempt on its node."""

    def __init__(
        self,
        folder: AttemptFolder,
        order: StartOrder,
        log: AttemptLog,
        *,
        staging: Staging,
        environments: Environments,
        images: Images,
        building: ImageBuilding,
        sealing: Sealing,
        node: NodeFacts,
    ) -> None:
        self._folder = folder
        self._order = order
        self._log = log
        self._staging = staging
        self._environments = environments
        self._images = images
        self._building = building
        self._sealing = sealing
        self._node = node

    def origin(self) -> dict[str, str]:
        """What was found out; empty before."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return {str(k): str(v) for k, v in json.loads((self._folder.path / "origin.json").read_bytes()).items()}
        return {}

    async def prepare(self, template: JobTemplate) -> None:
        """Ends with the spec on the disk.

        Args:
            template: the order's, with the values of secrets in place of their names; nothing of it is written down.

        Raises:
            StagingFailed, ImageRefused, EnvironmentRefused, MalformedSpec, MalformedNetwork, OSError.
        """
        order = self._order
        origin: dict[str, str] = {}
        tell = self._teller("workspace")
        version = await self._staging.lay(template, order.team_id, self._folder.workspace, tell)
        if version:
            origin[VERSION_OF[template.source.kind]] = version
            self._log.say("source", f"workspace: {template.source.url} at {version}")
            # Another try is of the same, whatever keeps this one from starting.
            await asyncio.to_thread(self._note, origin)
        if template.container.dockerfile:
            await self._prepare_built(template, origin)
        elif template.container == Container():
            await self._prepare_environment(template.environment, origin)
        else:
            await self._prepare_image(template.container, origin)

    async def _prepare_environment(self, environment_wanted: Environment, origin: dict[str, str]) -> None:
        order, node = self._order, self._node
        wanted = await self._wanted(environment_wanted)
        asker = Asker(order.team_id, self._folder.workspace, self._teller("environment"))
        async with self._environments.prepared(wanted, asker) as environment:
            self._log.say("environment", f"environment: {environment.name}")
            if environment.record:
                origin |= await self._keep_record(environment)
            uid = job_uid(order.team_uid, environment.prefix, node)
            self._tell_of_node(told_isolation(uid, node))
            await asyncio.to_thread(self._write_down, origin, environment.prefix, None)

    async def _prepare_image(self, container: Container, origin: dict[str, str]) -> None:
        """Args: container: with the registry's password in place of its name."""
        async with self._images.prepared(container, self._image_asker(self._tell_of_image)) as walls:
            self._tell_of_node(f"{walls.isolation}, image: {walls.image.name}")
            await asyncio.to_thread(self._write_down, origin, None, walls)

    async def _prepare_built(self, template: JobTemplate, origin: dict[str, str]) -> None:
        """Args: template: with the registry's password in place of its name."""
        order, resources = self._order, template.resources
        tell = self._tell_of_build()
        wanted = BuildOrder(
            team_uid=order.team_uid,
            workspace=self._folder.workspace,
            cpu_count=resources.cpu_count or 1.0,
            memory_bytes=resources.memory_bytes or None,
            timeout_s=template.timeout_s or None,
            network=replace(network_of(order, self._node), gang=None),
            tell=tell,
        )
        async with self._building.prepared(template.container, self._image_asker(tell), wanted) as walls:
            origin["image"] = walls.image.image
            self._tell_of_node(f"{walls.isolation}, image: {walls.image.name}")
            await asyncio.to_thread(self._write_down, origin, None, walls)

    def _image_asker(self, tell: Tell) -> ImageAsker:
        order = self._order
        # For GPUs that Ray was only told of there is nothing to ask of an engine.
        gpus = order.gpu_indices if self._node.gpus.devices_of(order.gpu_indices) else ()
        return ImageAsker(order.team_id, job_uid(order.team_uid, None, self._node), gpus, tell)

    def _tell_of_build(self) -> Tell:
        """Every line of a build, up to some thousands; then the newest now and then."""
        said, sparse = 0, self._teller("image")

        def tell(line: str) -> None:
            nonlocal said
            said += 1
            if said <= BUILD_LINES:
                self._log.say(f"image-{time.time_ns()}-{said}", f"image: {line[:500]}")
            else:
                sparse(line)

        return tell

    def _tell_of_image(self, line: str) -> None:
        self._log.say(f"image-{line}", f"image: {line}")

    def _tell_of_node(self, isolation: str) -> None:
        network = told_network(network_of(self._order, self._node))
        self._log.say("node", f"node: {self._node.hostname}, isolation: {isolation}, network: {network}")

    def _write_down(self, origin: dict[str, str], prefix: str | None, walls: Walls | None) -> None:
        self._note(origin)
        generate_files(self._order, self._node)
        # The order's own template: the values of secrets are on no disk.
        AttemptFolder.create(self._node.node_dir, spec_for(self._order, prefix, self._node, walls))

    def _note(self, origin: dict[str, str]) -> None:
        if origin:
            write_durably(self._folder.path / "origin.json", json.dumps(origin).encode())

    async def _wanted(self, environment: Environment) -> Environment:
        """A recorded environment is one whose list is in a file set."""
        if environment.kind != "recorded":
            return environment
        try:
            team_id = self._order.team_id
            text = await self._staging.read_file(environment.path, RECORD, team_id, MAX_TEXT_BYTES)
        except StagingFailed as error:
            detail = f"the recorded environment cannot be fetched: {error}"
            raise EnvironmentRefused(detail, may_pass=error.may_pass) from error
        return Environment(kind="requirements", requirements=text, python=environment.python)

    async def _keep_record(self, environment: Prepared) -> dict[str, str]:
        """A storage that is away costs the record and no job."""
        order = self._order
        assert environment.record
        note = Path(environment.prefix, KEPT)
        known = await asyncio.to_thread(_read_ids, note)
        if order.project_id not in known:
            owner = Owner(order.attempt_id, order.job_id, order.number, order.team_id, order.project_id)
            try:
                async with asyncio.timeout(KEEP_LIMIT_S):
                    kept = await self._sealing.seal_record(owner, environment.record, "environment")
            except (TimeoutError, NotKept) as error:
                why = short_reason(str(error)) or "storage does not answer"
                self._log.say("unrecorded", f"environment: its list is not kept: {why}")
                return {}
            known[order.project_id] = kept
            await asyncio.to_thread(write_new, note, json.dumps(known))
        return {"environment": known[order.project_id]}

    def _teller(self, what: str) -> Tell:
        """Says the first line at once and then the newest one now and then: a build may have thousands."""
        next_s = 0.0

        def tell(line: str) -> None:
            nonlocal next_s
            now_s = time.monotonic()
            if now_s >= next_s:
                next_s = now_s + TELL_S
                self._log.say(f"{what}-{time.time_ns()}", f"{what}: {line[:500]}")

        return tell


def _read_ids(note: Path) -> dict[str, str]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        loaded: dict[str, str] = json.loads(note.read_bytes())
        return loaded
    return {}
