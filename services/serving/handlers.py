"""One function per message: load, decide, save. What concerns the world outside is done by the loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError

from libs.common.clock import to_us
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    CreateDeployment,
    DeleteDeployment,
    Deployment,
    DeploymentCreated,
    DeploymentPage,
    GetDeployment,
    Job,
    JobCancelled,
    JobFailed,
    JobQueued,
    JobRunning,
    JobStarting,
    JobSucceeded,
    JobTimedOut,
    ListDeployments,
    NodesReported,
    Principal,
)
from libs.common.errors import Conflict, Invalid, NotFound
from libs.common.ids import new_id, new_secret, secret_hash
from libs.common.pages import decode_cursor, encode_cursor, page_limit
from libs.common.routing import ROLES
from services.serving.domain.front import NodeDoor, endpoint_host
from services.serving.domain.lifecycles import JOB_OVER
from services.serving.domain.names import checked_name
from services.serving.domain.templates import Programs, build_template
from services.serving.ports import Vault
from services.serving.store import DeploymentRow, RevisionRow, ServingUnit, revision_id, snapshot

JobEvent = JobQueued | JobStarting | JobRunning | JobSucceeded | JobFailed | JobCancelled | JobTimedOut
TOKEN_PREFIX = "nble"
FIRST_REVISION = 1


@dataclass(frozen=True, slots=True)
class Handlers:
    """The handlers and the little that they need."""

    vault: Vault
    programs: Programs
    apps_domain: str
    make_id: Callable[[str], str] = new_id
    make_secret: Callable[[str], str] = new_secret

    async def create_deployment(self, message: CreateDeployment, unit: ServingUnit, call: Envelope) -> Deployment:
        _check(message)
        if await unit.host_taken(message.name):
            raise _name_taken(message.name)
        deployment = self._new_deployment(message, unit, call.principal)
        revision = _first_revision(message, deployment, self.make_id("job"))
        unit.session.add_all([deployment, revision])
        try:
            await unit.session.flush()
        except IntegrityError:
            raise _name_taken(message.name) from None
        template = build_template(
            self.programs,
            name=message.name,
            framework=message.framework,
            model=message.model_name,
            version=message.model_version,
            fileset_id=message.model_fileset_id,
        )
        await unit.order_job(deployment, revision.build_job_id, "build", template)
        created = snapshot(deployment, revision)
        await unit.tell(DeploymentCreated(deployment=created), deployment)
        # Without the token: answers to requests are kept in plain text under their idempotency key.
        return created

    async def delete_deployment(self, message: DeleteDeployment, unit: ServingUnit, call: Envelope) -> Deployment:
        """Asks for it; its route goes first, then its jobs are halted, and then its name is free."""
        deployment = await _load(message.deployment_id, unit, call)
        if deployment.desired_state == "deleted":
            return snapshot(deployment, await unit.revision_of(deployment))
        changes = {"desired_state": "deleted", "detail": "It is being taken down.", "target": "", "due_us": 0}
        return await unit.move(deployment, "delete", changes)

    async def get_deployment(self, message: GetDeployment, unit: ServingUnit, call: Envelope) -> Deployment:
        deployment = await _load(message.deployment_id, unit, call)
        found = snapshot(deployment, await unit.revision_of(deployment))
        return self._with_token(found, deployment, call.principal)

    async def list_deployments(self, message: ListDeployments, unit: ServingUnit, call: Envelope) -> DeploymentPage:
        limit = page_limit(message.limit)
        before = decode_cursor(message.cursor) if message.cursor else ""
        rows = await unit.page(call.principal.team_id, message.project_id, before, limit + 1)
        shown = rows[:limit]
        revisions = await unit.revisions_of(shown)
        items = [self._with_token(snapshot(row, revisions[row.id]), row, call.principal) for row in shown]
        more = len(rows) > limit
        return DeploymentPage(items=tuple(items), next_cursor=encode_cursor(shown[-1].id) if more else "")

    async def note_job(self, message: JobEvent, unit: ServingUnit, _call: Envelope) -> None:
        await note_snapshot(message.job, unit)

    async def note_nodes(self, message: NodesReported, unit: ServingUnit, call: Envelope) -> None:
        """Where the running jobs of that executor's nodes are entered now."""
        doors = [NodeDoor(node.id, node.door) for node in message.nodes if node.door and node.state == "ready"]
        await unit.keep_doors(call.source, doors)

    def _new_deployment(self, message: CreateDeployment, unit: ServingUnit, principal: Principal) -> DeploymentRow:
        deployment_id, token = self.make_id("deployment"), self.make_secret(TOKEN_PREFIX)
        return DeploymentRow(
            id=deployment_id,
            team_id=principal.team_id,
            project_id=message.project_id,
            name=message.name,
            host_label=message.name,
            host=endpoint_host(message.name, self.apps_domain),
            state="building",
            detail="The build waits to start.",
            cpu_count=message.resources.cpu_count,
            memory_bytes=message.resources.memory_bytes,
            gpu_count=message.resources.gpu_count,
            created_by=principal.id,
            created_us=to_us(unit.now),
            token_sealed=self.vault.seal(token, deployment_id),
            token_hash=secret_hash(token),
            number=FIRST_REVISION,
        )

    def _with_token(self, shown: Deployment, row: DeploymentRow, principal: Principal) -> Deployment:
        """Who may call the endpoint sees its token; a viewer does not."""
        may_call = principal.role in ROLES and ROLES.index(principal.role) >= ROLES.index("member")
        if not may_call or row.state == "deleted":
            return shown
        return shown.model_copy(update={"endpoint_token": self.vault.open(row.token_sealed, row.id)})


async def note_snapshot(job: Job, unit: ServingUnit) -> None:
    """Keeps what the scheduler says of a job that is ours, if it is news, and has its deployment looked at."""
    known = await unit.job(job.id)
    if known is None or job.revision <= known.seen_revision:
        return
    now_us = to_us(unit.now)
    address = job.attempt.addresses.get(str(known.port), "")
    runs, over = job.state == "running", job.state in JOB_OVER
    values = {
        "state": job.state,
        "detail": job.detail[:2000],
        "address": address if runs else known.address,
        "running_us": now_us if runs and known.state != "running" else known.running_us,
        "ended_us": now_us if over else 0,
    }
    if not await unit.note_job(job.id, job.revision, values):
        return
    await unit.set_due(known.deployment_id, 0)
    deployment = await unit.deployment(known.deployment_id)
    if deployment and deployment.state == "deleted" and not over:
        # Its order overtook the halt: nobody else would end it.
        await unit.halt_job(deployment, job.id)


async def _load(id_or_name: str, unit: ServingUnit, call: Envelope) -> DeploymentRow:
    found = await unit.find_deployment(call.principal.team_id, id_or_name)
    if found is None:
        raise NotFound(
            "deployment_not_found",
            f"There is no deployment {id_or_name[:80]!r} in this team.",
            "See `nabla deployments list`.",
        )
    return found


def _check(message: CreateDeployment) -> None:
    checked_name(message.name)
    missing = [name for name in ("project_id", "model_fileset_id") if not getattr(message, name)]
    if missing:
        raise Invalid("incomplete", f"{missing[0]} is empty.", "Name a project and a model version.")
    wanted = message.resources
    if not 0 <= wanted.cpu_count <= 1e6 or not 0 <= wanted.memory_bytes <= 1 << 60:
        raise Invalid("bad_resources", "A replica cannot ask for this much.", "Give CPUs and bytes from 0 up.")
    if not 0 <= wanted.gpu_count <= 1e6 or wanted.gpu_count != int(wanted.gpu_count):
        raise Invalid("bad_resources", f"gpu_count is {wanted.gpu_count:g}; GPUs are given whole.", "Use 0, 1, 2.")


def _first_revision(message: CreateDeployment, deployment: DeploymentRow, build_job_id: str) -> RevisionRow:
    return RevisionRow(
        id=revision_id(deployment.id, FIRST_REVISION),
        deployment_id=deployment.id,
        number=FIRST_REVISION,
        model_id=message.model_id,
        model_name=message.model_name,
        model_version=message.model_version,
        framework=message.framework,
        model_fileset_id=message.model_fileset_id,
        state="building",
        build_job_id=build_job_id,
        created_us=deployment.created_us,
    )


def _name_taken(name: str) -> Conflict:
    return Conflict(
        "deployment_name_taken",
        f"The name {name!r} is taken: it is a host name, so it is unique in the whole installation.",
        "Choose another name, or delete the deployment that has it.",
    )
