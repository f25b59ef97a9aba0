"""One attempt's life on its node, told in the order in which it happens.

Everything that must survive the agent is in the attempt's folder: `order.json` (what was asked for), the shim's
records, the log's journal, `sealed.json` (what was kept) and `reported.json` (which phases the bus has stored).
`run` may therefore be begun again at any point, by another process, and goes on from what it finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from libs.common.clock import from_us, to_us, utc_now
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import Execution, JobTemplate, LogFrame, LogPage, Principal, ReportExecution
from libs.common.contracts.subjects import tail_subject
from libs.common.telemetry import span
from libs.common.waiting import end, happens
from services.executor.adapters.agent.agent_bus import AgentBus
from services.executor.adapters.agent.attempt_log import AttemptLog, Identity
from services.executor.adapters.agent.folder_watch import FolderWatch
from services.executor.adapters.agent.keeping import Keeping
from services.executor.adapters.agent.metering import Metered
from services.executor.adapters.agent.preparing import Preparing
from services.executor.adapters.agent.secrets import Revealed, Secrets, SecretsRefused
from services.executor.adapters.agent.tries import GivenUp, try_within_reason
from services.executor.adapters.agent.usage import Subject
from services.executor.adapters.agent.zygote_keeper import ZygoteKeeper
from services.executor.adapters.attempts import zygote
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, ExitRecord, MalformedSpec, write_durably
from services.executor.adapters.attempts.job_spec import NodeFacts
from services.executor.adapters.attempts.launch import end_strays
from services.executor.adapters.environments.environments import EnvironmentRefused, Environments
from services.executor.adapters.environments.image_building import ImageBuilding
from services.executor.adapters.runtimes.images import ImageRefused, Images
from services.executor.adapters.workspaces.sealing import Sealing
from services.executor.adapters.workspaces.staging import Staging, StagingFailed
from services.executor.adapters.workspaces.transfer import Threads, remove_tree
from services.executor.domain.beginnings import may_pass
from services.executor.domain.execution import ENDED, FINISHING, RUNNING, STARTING, short_reason
from services.executor.domain.network import MalformedNetwork
from services.executor.ports import GangOrder, Peer, StartOrder

LOOK_S = 1.0
STARTED_PATIENCE_S = 0.2
SHIP_AGAIN_S = 1.0
REFUSALS = (
    SecretsRefused,
    StagingFailed,
    ImageRefused,
    EnvironmentRefused,
    MalformedSpec,
    MalformedNetwork,
    zygote.StartFailed,
    OSError,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Means:
    """What all attempts of a node share.

    Args:
        address_of: where the front door finds a port of an execution, from the port and that of this node's loopback
            which leads to it.
    """

    bus: AgentBus
    secrets: Secrets
    staging: Staging
    sealing: Sealing
    environments: Environments
    images: Images
    building: ImageBuilding
    watch: FolderWatch
    node: NodeFacts
    starting: Threads
    zygote: ZygoteKeeper
    address_of: Callable[[str, int, int], str]


class AttemptRun:
    """Runs one attempt from its order to its reported end."""

    def __init__(self, folder: AttemptFolder, order: StartOrder, means: Means) -> None:
        self.order = order
        self._folder = folder
        self._means = means
        self._changed = asyncio.Event()
        self._log_changed = asyncio.Event()
        identity = Identity(order.job_id, order.attempt_id, order.number, order.rank)
        self._log = AttemptLog(folder.path, identity, self._send_frame, self._log_changed, self._show)
        self._keeping = Keeping(folder, order, self._log, means.sealing, means.node)
        self._preparing = Preparing(
            folder,
            order,
            self._log,
            staging=means.staging,
            environments=means.environments,
            images=means.images,
            building=means.building,
            sealing=means.sealing,
            node=means.node,
        )
        self._reported: dict[str, Any] = read_json(folder.path / "reported.json") or {}
        self.phase = str(self._reported.get("state", STARTING))
        self._metered: Metered | None = None

    @property
    def is_over(self) -> bool:
        """Its end is stored on the bus."""
        return self.phase == ENDED

    def present(self) -> Execution:
        """The attempt as this node knows it now."""
        return self._execution(self.phase)

    def metered(self) -> Metered | None:
        """What metering needs to know of an attempt whose job runs; read once."""
        if self.phase != RUNNING:
            return None
        if self._metered is None and (started := self._folder.read_started()) and (shim := self._folder.read_shim()):
            own_network = started.isolation != "process"
            subject = Subject(self.order.attempt_id, shim.pid, started.pid, own_network)
            order = self.order
            self._metered = Metered(
                subject, order.team_id, order.job_id, order.number, order.gpu_indices, started.at_us
            )
        return self._metered

    def stop(self, grace_s: float, reason: str) -> None:
        """Asks for the end, whatever the attempt is doing; harmless when it is over."""
        if self._folder.read_exit() is None:
            self._folder.request_stop(grace_s, reason)
            self._changed.set()

    async def run(self) -> None:
        if self.is_over:
            return
        self._means.watch.watch(self._folder.path, self._changed)
        self._means.watch.watch(self._folder.path, self._log_changed)
        self._means.watch.watch(self._folder.spool, self._log_changed)
        shipping = asyncio.create_task(self._ship())
        try:
            await self._start()
            await self._until_started()
            with self._span("watch"):
                ended = await self._until_ended()
            self._log.job_ended()
            await self._report(FINISHING)
            with self._span("keep"):
                await self._keeping.keep(ended)
            self._log.say("end", end_line(ended, self.order.template), tail=True)
            self._log.close()
            await shipping
            await self._report(ENDED)
        finally:
            self._means.watch.forget(self._changed)
            self._means.watch.forget(self._log_changed)
            await end([shipping], again_s=1.0)

    async def _ship(self) -> None:
        """Sends the log until it is whole. A disk that is full for a while delays it; the job may run for days."""
        while True:
            try:
                await self._log.ship()
            except Exception:
                log.exception("the log is shipped again", extra={"attempt_id": self.order.execution_id})
                await asyncio.sleep(SHIP_AGAIN_S)
            else:
                return

    async def _start(self) -> None:
        """Stages and starts, unless that was done before; whatever forbids it becomes the attempt's end."""
        if self._folder.read_exit() or self._folder.read_shim():
            return
        attempt_id = self.order.execution_id
        starting = try_within_reason(self._prepare_and_start, "start the job", attempt_id, _is_refusal)
        try:
            await self._or_stopped(starting)
        except _Stopped:
            stop = self._folder.read_stop()
            await self._never_started("stopped", stop.reason if stop else "")
        except GivenUp as error:
            # A shim that an unfinished call may start yet will find this, and run nothing.
            told = short_reason(self._log.masker.text(str(error)))
            await asyncio.to_thread(self._folder.request_stop, 0.0, told)
            await self._refuse(error)
        except REFUSALS as error:
            await self._refuse(error)

    async def _prepare_and_start(self) -> None:
        revealed = await self._means.secrets.reveal(self.order)
        self._log.masker = revealed.masker()
        if not (self._folder.path / "spec.json").exists():
            with self._span("prepare"):
                await self._preparing.prepare(revealed.template)
        with self._span("start"):
            await self._start_shim(revealed)

    async def _refuse(self, error: Exception) -> None:
        if self._folder.read_shim():
            return
        # First, as it may be what filled the disk: nothing could be said before.
        await asyncio.to_thread(remove_tree, self._folder.workspace)
        for number, line in enumerate(str(error).splitlines() or [repr(error)]):
            self._log.say(f"refused-{number}", line)
        await self._never_started("start_failure" if may_pass(error) else "refused", str(error))

    def _span(self, step: str) -> AbstractContextManager[object]:
        return span(f"agent {step}", self.order.traceparent, object=self.order.execution_id)

    async def _or_stopped(self, work: Any) -> None:
        """Does the work, but leaves it when somebody asks for the end."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                self._changed.clear()
                if self._folder.read_stop():
                    raise _Stopped
                waiting = asyncio.create_task(happens(self._changed, LOOK_S))
                await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
            await task
        finally:
            await end([task], again_s=1.0)

    async def _start_shim(self, revealed: Revealed) -> None:
        """Until a zygote answers. May be left at any point: a shim that comes after a stop wish heeds it."""
        while True:
            try:
                await self._means.starting.run(self._ask_zygote, revealed.for_shim())
            except zygote.ZygoteUnavailable as error:
                log.warning("the zygote does not answer", extra={"reason": str(error)})
            else:
                return

    def _ask_zygote(self, secrets: bytes) -> None:
        self._means.zygote.start_attempt(self._folder.path, secrets)

    async def _never_started(self, reason: Any, detail: str) -> None:
        if self._folder.read_shim():
            return  # it has all the same, and the shim says how it ended
        record = ExitRecord(
            code=None,
            signal=None,
            reason=reason,
            detail=short_reason(self._log.masker.text(detail)),
            peak_rss_bytes=0,
            started_at_us=None,
            ended_at_us=to_us(utc_now()),
        )
        await asyncio.to_thread(self._folder.write_exit, record)

    async def _until_started(self) -> None:
        while self._folder.read_started() is None:
            self._changed.clear()
            if self._folder.read_exit() or self._is_dead():
                return
            await happens(self._changed, STARTED_PATIENCE_S)
        await self._report(RUNNING)

    async def _until_ended(self) -> ExitRecord:
        while True:
            self._changed.clear()
            ended = self._folder.read_exit()
            if ended:
                return ended
            if self._is_dead():
                return await asyncio.to_thread(self._lost)
            await happens(self._changed, LOOK_S)

    def _is_dead(self) -> bool:
        """The shim was killed, and all of the job with it. It may have written its end just before."""
        return not self._folder.shim_is_alive() and self._folder.read_exit() is None

    def _lost(self) -> ExitRecord:
        """No reason of the shim's: this node's agent saw it gone. Written down, so that it is said once."""
        started = self._folder.read_started()
        record = ExitRecord(
            code=None,
            signal=None,
            reason="refused",
            detail="the process that watched over the job was killed, and the job with it",
            peak_rss_bytes=0,
            started_at_us=started.at_us if started else None,
            ended_at_us=to_us(utc_now()),
        )
        end_strays(self._folder)
        write_durably(self._folder.path / "lost.json", b"{}")
        self._folder.write_exit(record)
        return record

    async def _report(self, state: str) -> None:
        """Tells the executor; returns when the bus has stored it. A phase is told once for each node."""
        if state in self._reported.get("told", []):
            self.phase = state
            return
        execution = self._execution(state)
        envelope = Envelope(
            # The same for the same fact, so that a repetition is stored once; 40 characters at most.
            id=f"{self.order.execution_id}-{state[0]}{execution.node_id[:8]}"[:40],
            type=ReportExecution.ROUTE.type,
            source="agent",
            time=utc_now(),
            object_id=self.order.attempt_id,
            team_id=self.order.team_id,
            project_id=self.order.project_id,
            attempt=self.order.number,
            traceparent=self.order.traceparent,
            sender=Principal(kind="service", id="agent", team_id=self.order.team_id),
        )
        await self._means.bus.publish(ReportExecution(execution=execution), envelope)
        told = {"state": state, "told": [*self._reported.get("told", []), state]}
        await asyncio.to_thread(write_durably, self._folder.path / "reported.json", json.dumps(told).encode())
        self._reported = told
        self.phase = state

    def _addresses(self, ports: Mapping[int, int]) -> dict[str, str]:
        find, execution_id = self._means.address_of, self.order.execution_id
        return {str(port): find(execution_id, port, host_port) for port, host_port in ports.items()}

    def _execution(self, state: str) -> Execution:
        order, started, ended = self.order, self._folder.read_started(), self._folder.read_exit()
        seen = Execution(
            attempt_id=order.attempt_id,
            rank=order.rank,
            job_id=order.job_id,
            number=order.number,
            team_id=order.team_id,
            project_id=order.project_id,
            node_id=self._means.node.node_id,
            state=state,
            isolation=started.isolation if started else "",
            addresses=self._addresses(started.ports if started else {}),
            gpu_indices=order.gpu_indices,
            origin=self._preparing.origin(),
            started_at=from_us(started.at_us) if started else None,
        )
        if not ended or state != ENDED:
            return seen
        lost = (self._folder.path / "lost.json").exists()
        kept = self._keeping.record()
        unkept = kept.failed and ended.reason == "exited" and ended.code == 0
        return seen.model_copy(
            update={
                "reason": "lost" if lost else "refused" if unkept else ended.reason,
                "detail": short_reason("; ".join(filter(None, (ended.detail, kept.detail)))),
                "exit_code": None if unkept else ended.code,
                "signal": ended.signal,
                "peak_memory_bytes": ended.peak_rss_bytes,
                "ended_at": from_us(ended.ended_at_us),
            }
        )

    async def _send_frame(self, first_line: int, body: bytes) -> None:
        envelope = Envelope(
            id=f"{self.order.attempt_id}-{self.order.rank:x}-{first_line:x}",
            type=LogFrame.ROUTE.type,
            source="agent",
            time=utc_now(),
            object_id=self.order.job_id,
            team_id=self.order.team_id,
            project_id=self.order.project_id,
            attempt=self.order.number,
            traceparent=self.order.traceparent,
        )
        await self._means.bus.publish_body(LogFrame, body, envelope)

    async def _show(self, page: LogPage) -> None:
        subject = tail_subject(self.order.team_id, self.order.job_id)
        await self._means.bus.hint(subject, page.to_wire())


class _Stopped(Exception):
    """Somebody asked for the end before the start."""


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, REFUSALS)


def end_line(ended: ExitRecord, template: JobTemplate) -> str:
    """The log's last line, for people."""
    facts = [f"peak memory {_bytes(ended.peak_rss_bytes)}"] if ended.peak_rss_bytes else []
    match ended.reason:
        case "exited":
            facts.insert(0, f"exit code {ended.code}")
        case "out_of_memory":
            limit = template.resources.memory_bytes
            facts.insert(0, "killed: out of memory" + (f", limit {_bytes(limit)}" if limit else ""))
        case "start_failure":
            facts.insert(0, f"could not be started: {short_reason(ended.detail, 300)}")
        case "timed_out":
            facts.insert(0, f"ended: its time limit of {template.timeout_s:g} s is over")
        case _:
            facts.insert(0, f"{ended.reason}: {short_reason(ended.detail, 300)}".removesuffix(": "))
    if ended.started_at_us:
        facts.append(f"{(ended.ended_at_us - ended.started_at_us) / 1e6:.1f} s")
    return ", ".join(facts)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.0f} kB"


def write_order(folder: AttemptFolder, order: StartOrder) -> None:
    """Commits the order: from here on the attempt exists on this node."""
    for path in (folder.path.parent, folder.path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (folder.workspace, folder.artifacts, folder.tmp, folder.spool):
        path.mkdir(mode=0o700, exist_ok=True)
    plain = asdict(replace(order, template=JobTemplate())) | {"template": order.template.to_wire().decode()}
    write_durably(folder.path / "order.json", json.dumps(plain).encode())


def read_order(folder: AttemptFolder) -> StartOrder | None:
    plain = read_json(folder.path / "order.json")
    if plain is None:
        return None
    known = {field.name for field in fields(StartOrder)}  # an agent of another version may have written more
    template = JobTemplate.from_wire(plain["template"].encode())
    values = {name: value for name, value in plain.items() if name in known}
    gang = plain.get("gang")
    return StartOrder(
        **values
        | {"template": template, "gpu_indices": tuple(plain["gpu_indices"]), "gang": _read_gang(gang) if gang else None}
    )


def _read_gang(plain: dict[str, Any]) -> GangOrder:
    return GangOrder(**plain | {"peers": tuple(Peer(**peer) for peer in plain["peers"])})


def read_json(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        loaded: dict[str, Any] = json.loads(path.read_bytes())
        return loaded
    return None
