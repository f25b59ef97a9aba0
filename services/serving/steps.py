"""How each step of a deployment is recorded: one unit of work each, on the rows as they are by then."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from libs.common.clock import to_us
from libs.common.contracts.messages import Job, Resources
from libs.common.ids import new_id
from libs.common.store import Store
from services.serving.domain.plan import BENTO_PATIENCE_S, OrderedJob, Restart
from services.serving.domain.templates import Programs, replica_template
from services.serving.handlers import note_snapshot
from services.serving.store import DeploymentRow, OrderedJobRow, RevisionRow, ServingUnit

T = TypeVar("T")
MAX_DETAIL = 4000
# An order that an answering scheduler does not know after this long was refused, and is in its dead letters.
ORDER_LOST_S = 120.0
UNKNOWN = {
    "state": "cancelled",
    "detail": "The scheduler does not know the job: it was refused, perhaps because its project is not active.",
}


@dataclass(frozen=True, slots=True)
class Steps:
    """Args:
    choose_port: a port for the next replica; another one for each, as two may share a host's loopback.
    """

    store: Store[ServingUnit]
    programs: Programs
    choose_port: Callable[[], int]
    make_id: Callable[[str], str] = new_id

    async def say(self, seen: DeploymentRow, detail: str | None) -> None:
        if detail is None or detail == seen.detail:
            return

        async def work(unit: ServingUnit, now_there: DeploymentRow) -> None:
            await unit.swap(DeploymentRow, now_there.id, now_there.revision, {"detail": detail[:MAX_DETAIL]})

        await self._on(seen, work)

    async def collect(self, seen: DeploymentRow, job: OrderedJob, fileset_id: str, now: datetime) -> float:
        if fileset_id:

            async def work(unit: ServingUnit, deployment: DeploymentRow) -> None:
                changes = {"detail": "The bento is built; a replica is ordered."}
                await unit.move(deployment, "bento_built", changes, {"bento_fileset_id": fileset_id})

            await self._on(seen, work)
            return 0.0
        if job.ended_at and now - job.ended_at > timedelta(seconds=BENTO_PATIENCE_S):
            await self.fail(seen, "The build succeeded, but left no bento in its artifacts.", [])
            return 0.0
        return 1.0

    async def order_replica(self, seen: DeploymentRow) -> None:
        async def work(unit: ServingUnit, deployment: DeploymentRow) -> None:
            revision = await unit.revision_of(deployment)
            if revision.replica_job_id:
                return
            template = replica_template(
                self.programs,
                name=deployment.name,
                bento_fileset_id=revision.bento_fileset_id,
                token_hash=deployment.token_hash,
                port=self.choose_port(),
                resources=Resources(
                    cpu_count=deployment.cpu_count,
                    memory_bytes=deployment.memory_bytes,
                    gpu_count=deployment.gpu_count,
                ),
            )
            job_id = self.make_id("job")
            await unit.order_job(deployment, job_id, "replica", template)
            await unit.swap(RevisionRow, revision.id, revision.revision, {"replica_job_id": job_id})

        await self._on(seen, work)

    async def aim(self, seen: DeploymentRow, address: str) -> bool:
        """Records where requests are to go, before the proxy is told; False when that is no longer wanted."""

        async def work(unit: ServingUnit, deployment: DeploymentRow) -> bool:
            if deployment.target != address:
                await unit.swap(DeploymentRow, deployment.id, deployment.revision, {"target": address})
            return True

        return bool(await self._on(seen, work))

    async def ready(self, seen: DeploymentRow, address: str) -> None:
        async def work(unit: ServingUnit, deployment: DeploymentRow) -> None:
            if deployment.target == address:
                changes = {"detail": "", "ready_us": to_us(unit.now), "served": True}
                await unit.move(deployment, "replica_ready", changes)

        await self._on(seen, work)

    async def restart(self, seen: DeploymentRow, step: Restart, now: datetime) -> None:
        async def work(unit: ServingUnit, deployment: DeploymentRow) -> None:
            changes = {
                "detail": step.reason[:MAX_DETAIL],
                "target": "",
                "ready_us": 0,
                "deaths": step.deaths,
                "restart_us": to_us(now + timedelta(seconds=step.pause_s)),
            }
            await unit.move(deployment, "replica_ended", changes, {} if step.keep_job else {"replica_job_id": ""})

        await self._on(seen, work)

    async def fail(self, seen: DeploymentRow, reason: str, lines: Sequence[str]) -> None:
        detail = "\n".join([reason[:MAX_DETAIL], *(["Last lines of its log:", *lines] if lines else [])])

        async def work(unit: ServingUnit, deployment: DeploymentRow) -> None:
            changes = {"detail": detail[:MAX_DETAIL], "target": "", "ready_us": 0}
            await unit.move(deployment, "gave_up", changes)

        await self._on(seen, work)

    async def clear(self, seen: DeploymentRow) -> float:
        """After its routes are gone: done when its jobs have ended too."""

        async def work(unit: ServingUnit, deployment: DeploymentRow) -> float:
            if await unit.live_jobs(deployment.id):
                return 1.0
            if deployment.state == "deleting":
                await unit.move(deployment, "cleared", {"detail": "", "host_label": None})
            return 0.0

        left = await self._on(seen, work)
        return 0.0 if left is None else left

    async def halt(self, deployment: DeploymentRow, job_id: str) -> None:
        async def work(unit: ServingUnit) -> None:
            await unit.halt_job(deployment, job_id)
            await unit.set_job(job_id, {"halted": True})

        await self.store.run(work)

    async def asked(self, deployment: DeploymentRow, job: OrderedJobRow, told: Job | None, *, wanted: bool) -> None:
        """After a question to the scheduler: takes its answer, and repeats what it seems not to have heard."""

        async def work(unit: ServingUnit) -> None:
            await unit.set_job(job.id, {"asked_us": to_us(unit.now)})
            if told is not None:
                await note_snapshot(told, unit)
            elif job.state != "ordered" or (to_us(unit.now) - job.ordered_us) / 1e6 > ORDER_LOST_S:
                await unit.set_job(job.id, {**UNKNOWN, "ended_us": to_us(unit.now)})
                await unit.set_due(deployment.id, 0)
                return
            elif wanted:
                await unit.repeat_order(deployment, job)
            if not wanted:
                await unit.halt_job(deployment, job.id)

        await self.store.run(work)

    async def asked_in_vain(self, job_id: str) -> None:
        await self.store.run(lambda unit: unit.set_job(job_id, {"asked_us": to_us(unit.now)}))

    async def _on(self, seen: DeploymentRow, work: Callable[[ServingUnit, DeploymentRow], Awaitable[T]]) -> T | None:
        """Runs `work` on the row as it is now, unless its state is no longer the one the step was decided in."""

        async def guarded(unit: ServingUnit) -> T | None:
            deployment = await unit.deployment(seen.id)
            if deployment is None or deployment.state != seen.state:
                return None
            return await work(unit, deployment)

        return await self.store.run(guarded)
