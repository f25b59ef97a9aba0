"""Keeps what one attempt left, once, and says in its log and for its report what was not kept.

`sealed.json` in the attempt's folder records that it was done. What the platform itself fails to keep stays on the
node, out of the folder that is deleted after the end.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from services.executor.adapters.agent.attempt_log import AttemptLog
from services.executor.adapters.agent.tries import GivenUp, try_within_reason
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, ExitRecord, write_durably
from services.executor.adapters.attempts.job_spec import NodeFacts
from services.executor.adapters.workspaces.sealing import NotKept, Owner, Sealing
from services.executor.adapters.workspaces.transfer import is_full_disk
from services.executor.domain.execution import short_reason
from services.executor.ports import StartOrder

# Beside the attempts in the node's folder.
UNKEPT = "unkept"


@dataclass(frozen=True, slots=True)
class KeepingRecord:
    """`detail` says what was not kept; `failed`: the platform could not do it, and all of it stays on the node."""

    detail: str = ""
    failed: bool = False


class Keeping:
    """What one attempt left."""

    def __init__(
        self, folder: AttemptFolder, order: StartOrder, log: AttemptLog, sealing: Sealing, node: NodeFacts
    ) -> None:
        self._folder = folder
        self._order = order
        self._log = log
        self._sealing = sealing
        self._hostname = node.hostname
        self._aside = node.node_dir / UNKEPT / order.execution_id
        self._marker = folder.path / "sealed.json"

    def record(self) -> KeepingRecord:
        """What is known of it; an empty one as long as it is not done."""
        try:
            found = json.loads(self._marker.read_bytes())
        except FileNotFoundError:
            return KeepingRecord()
        return KeepingRecord(found.get("detail", ""), found.get("failed", False))

    async def keep(self, ended: ExitRecord) -> None:
        """Seals artifacts and models. What cannot be kept does not change how the job ended.

        A full disk is no fault, may be full for long, and is the caller's to wait for.
        """
        if ended.started_at_us is None:
            return
        if not self._marker.exists():
            step = partial(self._keep, ended)
            try:
                await try_within_reason(step, "keep what the job left", self._order.execution_id, is_full_disk)
            except GivenUp as error:
                said = f"{error}; it stays on {self._hostname} in {self._aside}"
                self._log.say("unkept", said, tail=True)
                await self._note(KeepingRecord(short_reason(said), failed=True))
        if self.record().failed:
            await asyncio.to_thread(_set_aside, self._folder.artifacts, self._aside)

    async def _keep(self, ended: ExitRecord) -> None:
        order = self._order
        owner = Owner(order.execution_id, order.job_id, order.number, order.team_id, order.project_id, order.rank)
        problems = await self._keep_artifacts(owner)
        if ended.reason == "exited" and ended.code == 0:
            problems += await self._keep_models(owner)
        await self._note(KeepingRecord(short_reason("; ".join(problems))))

    async def _keep_artifacts(self, owner: Owner) -> list[str]:
        """What was not kept, in words."""
        try:
            kept = await self._sealing.seal_artifacts(owner, self._folder.artifacts)
        except NotKept as error:
            problems = [f"artifacts: not kept: {error}"]
        else:
            if kept.file_count:
                self._log.say("artifacts", f"artifacts: {kept.file_count} files kept", tail=True)
            problems = [f"artifacts: left out: {line}" for line in kept.left_out.lines()]
        for number, problem in enumerate(problems):
            self._log.say(f"artifacts-{number}", problem, tail=True)
        return problems

    async def _keep_models(self, owner: Owner) -> list[str]:
        """What was not registered, in words."""
        problems = []
        for model in self._order.template.models:
            try:
                version = await self._sealing.register_model(owner, self._folder.artifacts, model)
                said = f"model: {model.name} version {version} registered"
            except NotKept as error:
                said = f"model: {model.name} not registered: {error}"
                problems.append(said)
            self._log.say(f"model-{model.name}", said, tail=True)
        return problems

    async def _note(self, record: KeepingRecord) -> None:
        await asyncio.to_thread(write_durably, self._marker, json.dumps(asdict(record)).encode())


def _set_aside(artifacts: Path, aside: Path) -> None:
    """Repeating it is harmless."""
    if artifacts.exists() and not aside.exists():
        aside.parent.mkdir(mode=0o700, exist_ok=True)
        artifacts.rename(aside)
