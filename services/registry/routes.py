"""What the registry listens to, who may ask it, and in which of its databases it is decided."""

from __future__ import annotations

from typing import Any

from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    ArchiveProject,
    AuthenticateAttempt,
    AuthenticateToken,
    CheckSecrets,
    CreateProject,
    CreateSignIn,
    CreateToken,
    DeleteProject,
    DeleteSecret,
    DoorOpened,
    GetFileset,
    GetJob,
    GetMetrics,
    GetModel,
    GetModelVersion,
    GetProject,
    GetRun,
    JobCancelled,
    JobFailed,
    JobQueued,
    JobRunning,
    JobStarting,
    JobSucceeded,
    JobTimedOut,
    JobUnreachable,
    ListModels,
    ListProjects,
    ListSecrets,
    ListTokens,
    LogRun,
    MoveProject,
    ProjectMoved,
    ProjectPurged,
    RecordUsage,
    RedeemSignIn,
    RegisterModel,
    RestoreProject,
    RevealSecrets,
    RevokeToken,
    SetSecret,
    SignOut,
    UpdateProject,
)
from libs.common.routing import GATEWAY_ONLY, INTERNAL, Handler, Prepare, Route, Routes, Rule
from services.registry.handlers import accounts, models, projects, runs, secrets
from services.registry.handlers.audit import audited, record_door

RUNS = "runs"

ALL_SERVICES = frozenset({"gateway", "scheduler", "executor", "storage", "serving"})

OWN_TOKENS = Rule(role="viewer", scope="admin")
READ_TOKENS = Rule(role="viewer", scope="read")
SIGN_IN = Rule(role="member", scope="write")
READ = Rule(role="viewer", scope="read", attempts=True, services=ALL_SERVICES)
LIST_PROJECTS = Rule(role="viewer", scope="read", services=ALL_SERVICES)
WRITE = Rule(role="member", scope="write")
LEAD = Rule(role="admin", scope="write")
REGISTER = Rule(role="member", scope="write", attempts=True, services=frozenset({"executor", "serving"}))
LOG = Rule(role="member", scope="write", attempts=True)
READ_SECRETS = Rule(role="viewer", scope="read")
# Node agents ask in the executor's name; the attempt's token is what decides.
REVEAL = Rule(role=None, scope="internal", services=frozenset({"executor"}))
NODES = Rule(role=None, scope="internal", services=frozenset({"executor"}))


def _write(message: type[Message], handler: Handler, rule: Rule, prepare: Prepare | None = None) -> Route:
    return Route(message, audited(handler), rule, prepare)


def _run(message: type[Message], handler: Any, rule: Rule = INTERNAL) -> Route:
    return Route(message, handler, rule, database=RUNS)


def routes(model_origins: models.Origins | None = None, values: secrets.Secrets | None = None) -> Routes:
    """Without arguments for whoever only reads subjects and rules: permissions, documents, tests."""
    origins: Any = model_origins or models.Origins
    valued: Any = values or secrets.Secrets
    return Routes(
        service="registry",
        routes=(
            Route(DoorOpened, record_door, INTERNAL),
            Route(AuthenticateToken, accounts.authenticate_token, GATEWAY_ONLY),
            _write(CreateToken, accounts.create_token, OWN_TOKENS),
            _write(RevokeToken, accounts.revoke_token, OWN_TOKENS),
            Route(ListTokens, accounts.list_tokens, READ_TOKENS),
            _write(CreateSignIn, accounts.create_sign_in, SIGN_IN),
            _write(RedeemSignIn, accounts.redeem_sign_in, GATEWAY_ONLY),
            _write(SignOut, accounts.sign_out, GATEWAY_ONLY),
            _write(CreateProject, projects.create_project, WRITE),
            _write(UpdateProject, projects.update_project, WRITE),
            _write(ArchiveProject, projects.archive_project, WRITE),
            _write(DeleteProject, projects.delete_project, LEAD),
            _write(RestoreProject, projects.restore_project, WRITE),
            _write(MoveProject, projects.move_project, LEAD),
            Route(GetProject, projects.get_project, READ),
            Route(ListProjects, projects.list_projects, LIST_PROJECTS),
            _write(RegisterModel, models.register_model, REGISTER, origins.prepare_version),
            Route(GetModel, models.get_model, READ),
            Route(GetModelVersion, models.get_model_version, READ),
            Route(ListModels, models.list_models, READ),
            # Nothing that was made of a value is kept: no answer by its key, not even the hash of the question.
            Route(SetSecret, audited(valued.set_secret), WRITE, repeatable=True),
            Route(RevealSecrets, valued.reveal_secrets, REVEAL, valued.find_claim, repeatable=True),
            _write(DeleteSecret, secrets.delete_secret, WRITE),
            Route(ListSecrets, secrets.list_secrets, READ_SECRETS),
            Route(CheckSecrets, secrets.check_secrets, READ_SECRETS),
            _run(LogRun, audited(runs.log_run, attempts=False), LOG),
            _run(RecordUsage, runs.record_usage, NODES),
            _run(GetRun, runs.get_run, READ),
            _run(GetMetrics, runs.get_metrics, READ),
            _run(JobQueued, runs.record_job),
            _run(JobStarting, runs.record_job),
            _run(JobRunning, runs.record_job),
            _run(JobUnreachable, runs.record_job),
            _run(JobSucceeded, runs.record_job),
            _run(JobFailed, runs.record_job),
            _run(JobCancelled, runs.record_job),
            _run(JobTimedOut, runs.record_job),
            _run(ProjectMoved, runs.move_runs),
            _run(ProjectPurged, runs.purge_runs),
        ),
        sends=(GetJob, GetFileset, AuthenticateAttempt),
    )
