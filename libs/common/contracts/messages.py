"""Every message on the bus. Generated from proto/ by infra/generate_contracts.py: edit there, not here."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

from pydantic import Field

from libs.common.contracts.message import Bytes, Int64, Kind, Message, Route


class Principal(Message):
    """Who acts. Travels with every request, query and command; the owner of an object checks it."""

    # user, attempt or service.
    kind: str = ""
    # User id, attempt id or service name.
    id: str = ""
    name: str = ""
    # The one team it acts for; a service names the team of the object at hand.
    team_id: str = ""
    # owner admin member viewer; empty for an attempt.
    role: str = ""
    # Limits of the token: empty for all, else a subset of "read", "write", "admin".
    scopes: tuple[str, ...] = ()
    # For an attempt: its project and job, the only ones it may touch.
    project_id: str = ""
    job_id: str = ""
    attempt: int = 0
    # Whether it may also decide about what belongs to the whole installation, as its nodes do.
    operator: bool = False


class User(Message):
    id: str = ""
    name: str = ""
    created_at: datetime | None = None


class Team(Message):
    id: str = ""
    name: str = ""
    created_at: datetime | None = None


class Token(Message):
    id: str = ""
    name: str = ""
    user_id: str = ""
    team_id: str = ""
    scopes: tuple[str, ...] = ()
    created_at: datetime | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    # Only in the answer that creates it.
    secret: str = ""


class AuthenticateToken(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "registry", "token.authenticate", reply="Principal")

    # SHA-256 of the token, in hex; the token itself never travels on the bus.
    token_hash: str = ""


class CreateToken(Message):
    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "token.create", reply="Token")

    name: str = ""
    scopes: tuple[str, ...] = ()
    lifetime_s: float = 0.0
    # SHA-256 of the secret, made by the gateway, which shows the secret once.
    token_hash: str = ""


class RevokeToken(Message):
    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "token.revoke", reply="Token")

    token_id: str = ""


class ListTokens(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "registry", "token.list", reply="TokenPage")

    cursor: str = ""
    limit: int = 0


class TokenPage(Message):
    items: tuple[Token, ...] = ()
    next_cursor: str = ""


class TokenRevoked(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "registry", "token.revoked")

    token_id: str = ""
    token_hash: str = ""


class CreateSignIn(Message):
    """A code that signs a browser in once, within ten minutes."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "sign_in.create", reply="SignIn")

    code_hash: str = ""


class SignIn(Message):
    id: str = ""
    expires_at: datetime | None = None


class RedeemSignIn(Message):
    """Spends the code; the answer is the session's token, whose secret the gateway made."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "sign_in.redeem", reply="Token")

    code_hash: str = ""
    token_hash: str = ""


class SignOut(Message):
    """Ends the session whose token a browser has shown to the gateway; ending it again changes nothing."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "sign_in.end", reply="Token")

    token_hash: str = ""


class Resources(Message):
    """What a job asks of a machine. Zero means "no wish" for memory and GPUs."""

    cpu_count: float = 0.0
    memory_bytes: Int64 = 0
    # Whole, or below 1: a share of one GPU.
    gpu_count: float = 0.0
    # As `nabla nodes list` names it, such as "H100"; empty for any.
    gpu_model: str = ""
    # The least memory that each of its GPUs has.
    gpu_memory_bytes: Int64 = 0


class Environment(Message):
    """Where `python` in the job comes from."""

    # default: the platform's small environment; venv: a virtual environment of the submitting machine, bound
    # read-only; requirements: built once per node and cached by their hash; workspace: as requirements, read from the
    # file of the workspace that `path` names (requirements.txt, pyproject.toml, pylock.toml, uv.lock); recorded: as the
    # file set that `path` names lists it, which an earlier job's environment left.
    kind: str = ""
    # A file may be followed by the names of its extras or groups: pyproject.toml[train]. With requirements it is the
    # name of the file that the text is of, which tells its format.
    path: str = ""
    requirements: str = ""
    # The Python to build it with, such as "3.12"; empty for the node's own.
    python: str = ""


class Container(Message):
    """An OCI image to run the job in."""

    image: str = ""
    # A Dockerfile of the workspace to build the image from, in place of `image`; its folder is the workspace.
    dockerfile: str = ""
    # As whom the job runs inside: a name or uid[:gid] of the image; empty for the platform's ordinary user.
    user: str = ""
    # Of the image's registry; each may be secret:NAME.
    registry_username: str = ""
    registry_password: str = ""
    # For the ARGs of the Dockerfile; they are in the image's history, so they hold no secrets.
    build_args: dict[str, str] = Field(default_factory=dict)
    # The id of the image that an earlier attempt built from the same; used where a node still has it.
    built: str = ""


class Source(Message):
    """Where the workspace is fetched from on the node, in place of a file set."""

    # git: a repository at a commit, tag or branch; s3: an archive (.tar, .tar.gz, .zip).
    kind: str = ""
    # https://host/repository.git, or s3://bucket/key
    url: str = ""
    # git: a commit, tag or branch, empty for the default branch. The commit that it was is recorded.
    ref: str = ""
    # Credentials: git's user and password or token, S3's access key and secret key. Each may be secret:NAME.
    username: str = ""
    password: str = ""
    # S3: https://host[:port] of the server; empty for Amazon's.
    endpoint: str = ""


class Retry(Message):
    """Which ends of an attempt deserve another one, and when."""

    # failure (any exit code but 0), exit:N, out_of_memory, node_lost, start_failure, timed_out. Empty: failure,
    # node_lost and start_failure.
    on: tuple[str, ...] = ()
    # Seconds before the second try; doubled with each one more, up to longest_s. Zero: 1 and 60.
    delay_s: float = 0.0
    longest_s: float = 0.0


class Role(Message):
    """The processes of one kind in a gang. What is empty is as in the template."""

    # torch: worker. grpc: master, worker, ps. mpi: master, worker. ray: head, worker.
    name: str = ""
    count: int = 0
    command: tuple[str, ...] = ()
    resources: Resources = Field(default_factory=Resources)
    machine_type: str = ""
    container: Container = Field(default_factory=Container)
    env: dict[str, str] = Field(default_factory=dict)


class Gang(Message):
    """Several processes of one job, on one node or many, that start together or not at all. Ranks count through the
    roles in their order."""

    # torch grpc mpi ray
    type: str = ""
    roles: tuple[Role, ...] = ()


class Input(Message):
    """A sealed file set that is laid into the job before it starts."""

    fileset_id: str = ""
    # Inside the job, below /workspace.
    path: str = ""


class ModelOutput(Message):
    """A folder below /artifacts that becomes a model version when the job succeeds."""

    name: str = ""
    path: str = ""
    framework: str = ""


class JobTemplate(Message):
    """Everything a client may say about a job."""

    name: str = ""
    # One element is a shell line; several are an argument vector.
    command: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    resources: Resources = Field(default_factory=Resources)
    # A sealed file set of kind workspace; empty for none.
    workspace_id: str = ""
    environment: Environment = Field(default_factory=Environment)
    timeout_s: float = 0.0
    max_retries: int = 0
    inputs: tuple[Input, ...] = ()
    models: tuple[ModelOutput, ...] = ()
    # Ports the job listens on that the platform makes reachable from the front door.
    ports: tuple[int, ...] = ()
    # command: a person's job. build, replica: a serving service's, started for a deployment.
    kind: str = ""
    # Where the workspace comes from, for people: folder, git commit, branch.
    origin: dict[str, str] = Field(default_factory=dict)
    # 0 to 100, the higher first; 50 unless said.
    priority: int | None = None
    # A named shape, which fills in what `resources` leaves open; see `nabla machines`.
    machine_type: str = ""
    # In place of the node's own system.
    container: Container = Field(default_factory=Container)
    source: Source = Field(default_factory=Source)
    # none: not even the front door; platform: the front door and the gang's peers; internet: these, and public
    # addresses. Empty: what the installation allows by default.
    network: str = ""
    retry: Retry = Field(default_factory=Retry)
    # Given up when it has waited for a machine so long. Zero: never.
    max_wait_s: float = 0.0
    gang: Gang = Field(default_factory=Gang)


class TimelineEntry(Message):
    """One entry of a job's history."""

    at: datetime | None = None
    state: str = ""
    detail: str = ""
    attempt: int = 0
    # Who moved it: a user, or the service that saw the cause.
    actor: str = ""
    # One word for programs: submitted, placed, exited, out_of_memory, node_lost, stop_asked, ...
    cause: str = ""
    # The trace in which it happened.
    trace_id: str = ""


class Member(Message):
    """One process of an attempt: rank 0 alone, or one of a gang."""

    rank: int = 0
    role: str = ""
    node_id: str = ""
    # placed starting running finishing ended
    state: str = ""
    # As of an execution.
    reason: str = ""
    detail: str = ""
    exit_code: int | None = None
    isolation: str = ""
    peak_memory_bytes: Int64 = 0
    addresses: dict[str, str] = Field(default_factory=dict)
    gpu_indices: tuple[int, ...] = ()


class Attempt(Message):
    """One try of a job, as the scheduler knows it."""

    id: str = ""
    number: int = 0
    state: str = ""
    node_id: str = ""
    detail: str = ""
    exit_code: int | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    isolation: str = ""
    peak_memory_bytes: Int64 = 0
    # Inside port -> "host:port" where the node's forwarder listens.
    addresses: dict[str, str] = Field(default_factory=dict)
    gpu_indices: tuple[int, ...] = ()
    # Of a gang, by rank; empty for a job of one process.
    members: tuple[Member, ...] = ()
    # When ended, as of the execution whose end it is: of a gang, the one that broke it.
    reason: str = ""
    # As of an execution.
    origin: dict[str, str] = Field(default_factory=dict)


class Job(Message):
    """One execution request and all that is known of it."""

    id: str = ""
    team_id: str = ""
    project_id: str = ""
    experiment_id: str = ""
    template: JobTemplate = Field(default_factory=JobTemplate)
    # submitted waiting queued starting running unreachable succeeded failed cancelled timed_out
    state: str = ""
    # Why it is in this state, for people.
    detail: str = ""
    # running or cancelled: what the user wants.
    desired_state: str = ""
    revision: Int64 = 0
    created_at: datetime | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    exit_code: int | None = None
    attempt: Attempt = Field(default_factory=Attempt)
    created_by: str = ""


class JobQueued(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "scheduler", "job.queued")

    job: Job = Field(default_factory=Job)


class JobStarting(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "scheduler", "job.starting")

    job: Job = Field(default_factory=Job)


class JobRunning(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "scheduler", "job.running")

    job: Job = Field(default_factory=Job)


class JobUnreachable(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "scheduler", "job.unreachable")

    job: Job = Field(default_factory=Job)


class JobSucceeded(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "scheduler", "job.succeeded")

    job: Job = Field(default_factory=Job)


class JobFailed(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "scheduler", "job.failed")

    job: Job = Field(default_factory=Job)


class JobCancelled(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "scheduler", "job.cancelled")

    job: Job = Field(default_factory=Job)


class JobTimedOut(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "scheduler", "job.timed_out")

    job: Job = Field(default_factory=Job)


class SubmitJob(Message):
    """Asked by people through the gateway."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "scheduler", "job.submit", reply="Job")

    project_id: str = ""
    template: JobTemplate = Field(default_factory=JobTemplate)
    experiment_id: str = ""


class OrderJob(Message):
    """Ordered by the serving service for builds and replicas; the sender chooses the id, so repeating is harmless."""

    ROUTE: ClassVar[Route] = Route(Kind.COMMAND, "scheduler", "job.order")

    job_id: str = ""
    project_id: str = ""
    template: JobTemplate = Field(default_factory=JobTemplate)


class StopJob(Message):
    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "scheduler", "job.stop", reply="Job")

    job_id: str = ""


class HaltJob(Message):
    ROUTE: ClassVar[Route] = Route(Kind.COMMAND, "scheduler", "job.halt")

    job_id: str = ""


class GetJob(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "scheduler", "job.get", reply="JobDetail")

    job_id: str = ""


class JobDetail(Message):
    job: Job = Field(default_factory=Job)
    attempts: tuple[Attempt, ...] = ()
    timeline: tuple[TimelineEntry, ...] = ()


class ListJobs(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "scheduler", "job.list", reply="JobPage")

    project_id: str = ""
    experiment_id: str = ""
    state: str = ""
    # command by default; "any" includes builds and replicas.
    kind: str = ""
    cursor: str = ""
    limit: int = 0


class JobPage(Message):
    items: tuple[Job, ...] = ()
    next_cursor: str = ""


class RetryJob(Message):
    """A new job from the template of one that has ended, in its experiment."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "scheduler", "job.retry", reply="Job")

    job_id: str = ""


class CloneJob(Message):
    """A new job from the template of another, in its experiment. What is left out stays as it was."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "scheduler", "job.clone", reply="Job")

    job_id: str = ""
    name: str = ""
    command: tuple[str, ...] = ()
    # Set over the job's own.
    env: dict[str, str] = Field(default_factory=dict)
    # What of it is not 0 or empty replaces the job's own.
    resources: Resources = Field(default_factory=Resources)
    # Replaces all that the job asked for; `resources` counts over it.
    machine_type: str = ""
    priority: int | None = None
    timeout_s: float | None = None
    max_retries: int | None = None


class ExplainJob(Message):
    """Why the job is in its state; of a waiting one, what it waits for."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "scheduler", "job.explain", reply="JobExplanation")

    job_id: str = ""


class NodeRoom(Message):
    """What is free on a node, seen by one job."""

    node_id: str = ""
    hostname: str = ""
    total: Resources = Field(default_factory=Resources)
    free: Resources = Field(default_factory=Resources)
    # Why nothing of the job can go there now; empty where a process of it could.
    obstacle: str = ""


class Holder(Message):
    """A job of the asker's team that holds part of a node."""

    job_id: str = ""
    name: str = ""
    state: str = ""
    node_ids: tuple[str, ...] = ()
    holds: Resources = Field(default_factory=Resources)
    started_at: datetime | None = None


class JobExplanation(Message):
    job_id: str = ""
    state: str = ""
    # One sentence, for people.
    summary: str = ""
    # As in the newest entry of the timeline.
    cause: str = ""
    # By rank.
    needs: tuple[Resources, ...] = ()
    priority: int = 0
    # How many waiting jobs come before it by priority and age, and how many wait in all.
    before: int = 0
    waiting: int = 0
    nodes: tuple[NodeRoom, ...] = ()
    holders: tuple[Holder, ...] = ()
    # What jobs of other teams hold, together.
    held_by_others: Resources = Field(default_factory=Resources)
    not_before: datetime | None = None
    give_up_at: datetime | None = None
    # What can be done about it, for people.
    advice: str = ""


class Revision(Message):
    number: int = 0
    model_id: str = ""
    model_name: str = ""
    model_version: int = 0
    framework: str = ""
    model_fileset_id: str = ""
    bento_fileset_id: str = ""
    # building starting ready failed retired
    state: str = ""
    detail: str = ""
    build_job_id: str = ""
    replica_job_id: str = ""
    created_at: datetime | None = None


class Deployment(Message):
    id: str = ""
    team_id: str = ""
    project_id: str = ""
    name: str = ""
    # building starting ready failed deleting deleted
    state: str = ""
    # Why, for people; with the last lines of the log when it failed.
    detail: str = ""
    # running or deleted: what the user wants.
    desired_state: str = ""
    revision: Revision = Field(default_factory=Revision)
    # Path on the front door for programs, "/d/NAME", and host name for browsers, "NAME.apps.<domain>".
    path: str = ""
    host: str = ""
    created_by: str = ""
    created_at: datetime | None = None
    ready_at: datetime | None = None
    record_revision: Int64 = 0
    # The bearer token of the endpoint; only for members of the team who may call it.
    endpoint_token: str = ""
    resources: Resources = Field(default_factory=Resources)


class CreateDeployment(Message):
    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "serving", "deployment.create", reply="Deployment")

    name: str = ""
    project_id: str = ""
    # As the gateway read them from the registry.
    model_id: str = ""
    model_name: str = ""
    model_version: int = 0
    framework: str = ""
    model_fileset_id: str = ""
    resources: Resources = Field(default_factory=Resources)


class DeleteDeployment(Message):
    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "serving", "deployment.delete", reply="Deployment")

    deployment_id: str = ""


class GetDeployment(Message):
    """By id or by name."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "serving", "deployment.get", reply="Deployment")

    deployment_id: str = ""


class ListDeployments(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "serving", "deployment.list", reply="DeploymentPage")

    project_id: str = ""
    cursor: str = ""
    limit: int = 0


class DeploymentPage(Message):
    items: tuple[Deployment, ...] = ()
    next_cursor: str = ""


class DeploymentCreated(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "serving", "deployment.created")

    deployment: Deployment = Field(default_factory=Deployment)


class DeploymentStarting(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "serving", "deployment.starting")

    deployment: Deployment = Field(default_factory=Deployment)


class DeploymentReady(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "serving", "deployment.ready")

    deployment: Deployment = Field(default_factory=Deployment)


class DeploymentFailed(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "serving", "deployment.failed")

    deployment: Deployment = Field(default_factory=Deployment)


class DeploymentDeleted(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "serving", "deployment.deleted")

    deployment: Deployment = Field(default_factory=Deployment)


class OpenDoor(Message):
    """Asked by people through the gateway, for a job that runs."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "executor", "door.open", reply="Door")

    job_id: str = ""
    rank: int = 0
    # ssh: an SSH server in the sandbox; tcp: a port of the sandbox.
    kind: str = ""
    port: int = 0
    # ssh: with which key the client signs in, as authorized_keys has it.
    public_key: str = ""


class Door(Message):
    # Below the front door; a request with `Upgrade: nabla-tunnel` and `Authorization: Ticket ...` becomes the stream.
    path: str = ""
    # For one connection, begun before it expires.
    ticket: str = ""
    expires_at: datetime | None = None
    # ssh: the server's key, as known_hosts has it.
    host_key: str = ""
    job_id: str = ""
    attempt_id: str = ""


class DoorOpened(Message):
    """For the audit: somebody was let into a job."""

    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "executor", "door.opened")

    job_id: str = ""
    attempt_id: str = ""
    rank: int = 0
    kind: str = ""
    port: int = 0
    # The user's id.
    by: str = ""


class GetFrontDoorPass(Message):
    """Serving asks that nodes let the front door in, by a key that is the front door's alone."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "executor", "front_door.get", reply="FrontDoorPass")

    # Ed25519, in PEM.
    public_key: str = ""


class FrontDoorPass(Message):
    # Of the public key, and of the authority that nodes show certificates of; both in PEM.
    certificate: str = ""
    authority: str = ""


class Execution(Message):
    attempt_id: str = ""
    job_id: str = ""
    number: int = 0
    team_id: str = ""
    project_id: str = ""
    node_id: str = ""
    # accepted reserved starting running finishing ended
    state: str = ""
    # When ended: exited stopped timed_out out_of_memory fenced lost refused start_failure. What is refused would be
    # refused again; the cause of a start_failure may pass: a registry or an index that did not answer.
    reason: str = ""
    detail: str = ""
    exit_code: int | None = None
    signal: int | None = None
    peak_memory_bytes: Int64 = 0
    isolation: str = ""
    # Inside port -> "host:port".
    addresses: dict[str, str] = Field(default_factory=dict)
    gpu_indices: tuple[int, ...] = ()
    started_at: datetime | None = None
    ended_at: datetime | None = None
    revision: Int64 = 0
    # Which process of the attempt; 0 unless it is a gang.
    rank: int = 0
    # What the node found it to be: commit or etag (of the template's source), environment (the file set that lists
    # what is in a built one). With them the same can be run again.
    origin: dict[str, str] = Field(default_factory=dict)


class Seat(Message):
    """Where one process of an attempt is to run."""

    rank: int = 0
    node_id: str = ""


class StartExecution(Message):
    ROUTE: ClassVar[Route] = Route(Kind.COMMAND, "executor", "execution.start")

    attempt_id: str = ""
    job_id: str = ""
    number: int = 0
    project_id: str = ""
    node_id: str = ""
    experiment_id: str = ""
    template: JobTemplate = Field(default_factory=JobTemplate)
    # Of a gang, all its ranks; empty for one process on node_id.
    seats: tuple[Seat, ...] = ()


class StopExecution(Message):
    ROUTE: ClassVar[Route] = Route(Kind.COMMAND, "executor", "execution.stop")

    attempt_id: str = ""
    reason: str = ""


class ReportExecution(Message):
    """What a node agent saw of an attempt; telling it twice is harmless."""

    ROUTE: ClassVar[Route] = Route(Kind.COMMAND, "executor", "execution.report")

    execution: Execution = Field(default_factory=Execution)


class ExecutionRunning(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "executor", "execution.running")

    execution: Execution = Field(default_factory=Execution)


class ExecutionFinishing(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "executor", "execution.finishing")

    execution: Execution = Field(default_factory=Execution)


class ExecutionEnded(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "executor", "execution.ended")

    execution: Execution = Field(default_factory=Execution)


class ListExecutions(Message):
    """For reconciling: what the executor knows of these attempts."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "executor", "execution.list", reply="ExecutionPage")

    attempt_ids: tuple[str, ...] = ()


class ExecutionPage(Message):
    items: tuple[Execution, ...] = ()


class AuthenticateAttempt(Message):
    """Whose attempt token is this? Refused when the attempt has ended."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "executor", "execution.authenticate", reply="Execution")

    token_hash: str = ""


class Experiment(Message):
    """A named template plus its jobs."""

    id: str = ""
    team_id: str = ""
    project_id: str = ""
    name: str = ""
    # single, or gang; later search.
    kind: str = ""
    created_by: str = ""
    created_at: datetime | None = None
    revision: Int64 = 0
    jobs: tuple[Job, ...] = ()


class ExperimentCreated(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "scheduler", "experiment.created")

    experiment: Experiment = Field(default_factory=Experiment)


class StartExperiment(Message):
    """Creates the experiment and its job in one commit."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "scheduler", "experiment.start", reply="Experiment")

    project_id: str = ""
    name: str = ""
    kind: str = ""
    template: JobTemplate = Field(default_factory=JobTemplate)


class GetExperiment(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "scheduler", "experiment.get", reply="Experiment")

    experiment_id: str = ""


class ListExperiments(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "scheduler", "experiment.list", reply="ExperimentPage")

    project_id: str = ""
    cursor: str = ""
    limit: int = 0


class ExperimentPage(Message):
    items: tuple[Experiment, ...] = ()
    next_cursor: str = ""


class File(Message):
    # Relative, with forward slashes.
    path: str = ""
    size_bytes: Int64 = 0
    md5: str = ""
    sha256: str = ""
    # In answers: where to PUT (when open) or GET (when sealed), valid for minutes.
    url: str = ""


class Fileset(Message):
    id: str = ""
    team_id: str = ""
    project_id: str = ""
    # workspace artifacts model bento environment
    kind: str = ""
    # open sealed deleted
    state: str = ""
    # SHA-256 over the sorted list of paths and file hashes.
    digest: str = ""
    file_count: int = 0
    size_bytes: Int64 = 0
    job_id: str = ""
    attempt: int = 0
    created_at: datetime | None = None
    sealed_at: datetime | None = None
    revision: Int64 = 0


class OpenFileset(Message):
    """Opens a file set and answers where to put each file; one already sealed with this digest is answered as is."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "storage", "fileset.open", reply="FilesetGrant")

    kind: str = ""
    project_id: str = ""
    digest: str = ""
    files: tuple[File, ...] = ()
    job_id: str = ""
    attempt: int = 0
    # The front door as the client reached it ("host:port"): URLs are signed for it.
    endpoint: str = ""
    # Of artifacts: which process of the attempt left them.
    rank: int = 0


class FilesetGrant(Message):
    fileset: Fileset = Field(default_factory=Fileset)
    # What is still missing, each with a URL to PUT to; empty when all is there.
    uploads: tuple[File, ...] = ()


class SealFileset(Message):
    """Checks that every file has arrived whole, then makes the set immutable."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "storage", "fileset.seal", reply="Fileset")

    fileset_id: str = ""


class FilesetSealed(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "storage", "fileset.sealed")

    fileset: Fileset = Field(default_factory=Fileset)


class GetFileset(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "storage", "fileset.get", reply="Fileset")

    fileset_id: str = ""


class ListFiles(Message):
    """The files with a URL to GET each; of one file set, or of the newest attempt's artifacts of a job."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "storage", "fileset.list", reply="FilePage")

    fileset_id: str = ""
    job_id: str = ""
    cursor: str = ""
    limit: int = 0
    endpoint: str = ""


class FilePage(Message):
    fileset: Fileset = Field(default_factory=Fileset)
    items: tuple[File, ...] = ()
    next_cursor: str = ""


class LogLine(Message):
    # Position in the job's whole log, over all attempts and ranks, given by the storage service; from 1.
    sequence: Int64 = 0
    at: datetime | None = None
    # stdout, stderr, or nabla for the platform's own words.
    stream: str = ""
    text: str = ""
    attempt: int = 0
    rank: int = 0
    # It was split, or ended without a newline: the next line of the same stream, attempt and rank goes on with it.
    cut: bool = False


class LogBatch(Message):
    """Consecutive lines of one stream that arrived together."""

    at: datetime | None = None
    stream: str = ""
    line_count: int = 0
    attempt: int = 0
    rank: int = 0
    # The last of these lines is cut.
    cut: bool = False


class LogSlice(Message):
    """Many lines at once, so that nobody on the way of a flood touches each of them."""

    # Of the first line, where storage has given it; 0 before.
    first_sequence: Int64 = 0
    batches: tuple[LogBatch, ...] = ()
    # UTF-8, each line ended by a newline, compressed with zlib.
    text: Bytes = b""
    # Of the text before it was compressed.
    size_bytes: Int64 = 0


class LogFrame(Message):
    """Lines as a node agent ships them. first_line counts from 0 within one attempt and rank."""

    ROUTE: ClassVar[Route] = Route(Kind.FRAME, "storage", "log.frame")

    job_id: str = ""
    attempt_id: str = ""
    attempt: int = 0
    rank: int = 0
    first_line: Int64 = 0
    lines: tuple[LogLine, ...] = ()
    # No line follows in this attempt and rank.
    last: bool = False
    # After `lines`, and the usual way.
    slice: LogSlice = Field(default_factory=LogSlice)


class LogSealed(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "storage", "log.sealed")

    job_id: str = ""
    line_count: Int64 = 0
    size_bytes: Int64 = 0


class GetLog(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "storage", "log.get", reply="LogPage")

    job_id: str = ""
    # Lines with a greater sequence; negative: the last -after lines.
    after: Int64 = 0
    limit: int = 0
    # Answer with slices instead of lines; whole ones, so that there may be more lines than `limit`.
    sliced: bool = False


class LogPage(Message):
    lines: tuple[LogLine, ...] = ()
    # The log is whole: no line will come after these.
    complete: bool = False
    last_sequence: Int64 = 0
    # The object store has the whole log, so that nothing of it need be kept elsewhere.
    sealed: bool = False
    slices: tuple[LogSlice, ...] = ()
    # What a running job shows just now on lines that it has not ended, such as progress bars. On live tails alone.
    unfinished: tuple[LogLine, ...] = ()


class MachineType(Message):
    """A named shape to ask for in place of single numbers."""

    name: str = ""
    resources: Resources = Field(default_factory=Resources)
    # How many jobs of it could start now.
    startable: int = 0
    # The nodes that have it when nobody uses them.
    hostnames: tuple[str, ...] = ()


class ListMachines(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "scheduler", "machine.list", reply="MachinePage")


class MachinePage(Message):
    items: tuple[MachineType, ...] = ()
    # file: the installation names them; nodes: taken from the nodes there are.
    source: str = ""
    # Why there are none, for people.
    detail: str = ""


class ModelVersion(Message):
    id: str = ""
    model_id: str = ""
    model_name: str = ""
    version: int = 0
    framework: str = ""
    description: str = ""
    fileset_id: str = ""
    size_bytes: Int64 = 0
    digest: str = ""
    # Where it came from: a job, or empty for an upload.
    job_id: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)
    created_by: str = ""
    created_at: datetime | None = None
    project_id: str = ""


class Model(Message):
    id: str = ""
    team_id: str = ""
    project_id: str = ""
    name: str = ""
    description: str = ""
    created_at: datetime | None = None
    revision: Int64 = 0
    latest_version: int = 0
    latest: ModelVersion = Field(default_factory=ModelVersion)


class RegisterModel(Message):
    """Adds a version to the named model, and makes the model when it is new."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "model.register", reply="ModelVersion")

    name: str = ""
    project_id: str = ""
    framework: str = ""
    description: str = ""
    # A sealed file set of kind model.
    fileset_id: str = ""
    job_id: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)
    size_bytes: Int64 = 0
    digest: str = ""


class ModelVersionRegistered(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "registry", "model.registered")

    version: ModelVersion = Field(default_factory=ModelVersion)


class GetModel(Message):
    """By id or by name; version 0 is the newest."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "registry", "model.get", reply="ModelDetail")

    model_id: str = ""
    project_id: str = ""


class ModelDetail(Message):
    model: Model = Field(default_factory=Model)
    versions: tuple[ModelVersion, ...] = ()


class GetModelVersion(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "registry", "model_version.get", reply="ModelVersion")

    model_id: str = ""
    version: int = 0
    project_id: str = ""


class ListModels(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "registry", "model.list", reply="ModelPage")

    project_id: str = ""
    cursor: str = ""
    limit: int = 0


class ModelPage(Message):
    items: tuple[Model, ...] = ()
    next_cursor: str = ""


class Node(Message):
    id: str = ""
    hostname: str = ""
    # ready silent gone, or resting: it has nothing to do and no agent, so that it may be taken away.
    state: str = ""
    cpu_count: float = 0.0
    memory_bytes: Int64 = 0
    gpu_count: float = 0.0
    gpu_model: str = ""
    # bwrap or process, and why and what restores isolation when it is process.
    isolation: str = ""
    isolation_detail: str = ""
    seen_at: datetime | None = None
    gpu_memory_bytes: Int64 = 0
    # As other nodes reach it.
    address: str = ""
    # What it can run besides plain processes: podman, docker.
    runtimes: tuple[str, ...] = ()
    # Takes no new work; what runs on it finishes.
    draining: bool = False
    # How far its sandboxes' networks go: full (own address, peers, internet), loopback, host.
    network: str = ""
    # Held by attempts now, as lists of nodes tell it; the executor's own reports do not.
    cpu_used: float = 0.0
    memory_used_bytes: Int64 = 0
    gpu_used: float = 0.0
    attempt_count: int = 0
    # Of the asking team's.
    job_ids: tuple[str, ...] = ()
    # "host:port" of its door, as the front door reaches it.
    door: str = ""


class NodesReported(Message):
    """The executor's whole inventory, sent on change and every few seconds: it doubles as its sign of life."""

    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "executor", "node.reported")

    nodes: tuple[Node, ...] = ()
    # Why there is none, for people: "the Ray cluster is still starting".
    detail: str = ""


class ListNodes(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "executor", "node.list", reply="NodePage")


class NodePage(Message):
    items: tuple[Node, ...] = ()
    detail: str = ""


class DrainNode(Message):
    """Takes no new work, and rests when what runs there has ended; or, undone, works again."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "executor", "node.drain", reply="Node")

    node_id: str = ""
    undo: bool = False


class NodeToken(Message):
    """A ticket with which one machine may join the cluster, once and soon."""

    expires_at: datetime | None = None
    # What the machine must have.
    python_version: str = ""
    ray_version: str = ""
    # Shown once, by whoever made it.
    secret: str = ""


class CreateNodeToken(Message):
    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "executor", "node.invite", reply="NodeToken")

    token_hash: str = ""


class CheckNodeToken(Message):
    """Is this ticket still good? It stays so."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "executor", "node.authenticate", reply="NodeToken")

    token_hash: str = ""


class AdmitNode(Message):
    """The ticket is used up, and the answer is what the machine needs to join."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "executor", "node.admit", reply="NodeGrant")

    token_hash: str = ""
    hostname: str = ""


class NodeGrant(Message):
    # Of the Ray cluster, as the new machine reaches it.
    ray_address: str = ""
    ray_token: str = ""


class Demand(Message):
    """So many jobs of one shape wait for a machine that is not there."""

    resources: Resources = Field(default_factory=Resources)
    count: int = 0


class DemandChanged(Message):
    """All demand that no present node can take, sent on change and every few seconds while there is any: what is not
    repeated is withdrawn."""

    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "scheduler", "demand.changed")

    demands: tuple[Demand, ...] = ()


class Project(Message):
    id: str = ""
    team_id: str = ""
    name: str = ""
    description: str = ""
    # active archived deleted
    state: str = ""
    created_by: str = ""
    created_at: datetime | None = None
    updated_at: datetime | None = None
    revision: Int64 = 0


class ProjectCreated(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "registry", "project.created")

    project: Project = Field(default_factory=Project)


class ProjectUpdated(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "registry", "project.updated")

    project: Project = Field(default_factory=Project)


class ProjectArchived(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "registry", "project.archived")

    project: Project = Field(default_factory=Project)


class ProjectDeleted(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "registry", "project.deleted")

    project: Project = Field(default_factory=Project)


class ProjectRestored(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "registry", "project.restored")

    project: Project = Field(default_factory=Project)


class ProjectMoved(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "registry", "project.moved")

    project: Project = Field(default_factory=Project)
    from_team_id: str = ""


class ProjectPurged(Message):
    """The days that a deleted project is kept are over: whoever holds something of it lets go of it."""

    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "registry", "project.purged")

    project: Project = Field(default_factory=Project)


class CreateProject(Message):
    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "project.create", reply="Project")

    name: str = ""
    description: str = ""


class UpdateProject(Message):
    """Empty fields stay as they are."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "project.update", reply="Project")

    project_id: str = ""
    name: str | None = None
    description: str | None = None


class ArchiveProject(Message):
    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "project.archive", reply="Project")

    project_id: str = ""


class DeleteProject(Message):
    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "project.delete", reply="Project")

    project_id: str = ""


class RestoreProject(Message):
    """Undoes archive and, within the days that deleted projects are kept, delete."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "project.restore", reply="Project")

    project_id: str = ""


class MoveProject(Message):
    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "project.move", reply="Project")

    project_id: str = ""
    team_id: str = ""


class GetProject(Message):
    """By id, or by name within the caller's team."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "registry", "project.get", reply="Project")

    project_id: str = ""


class ListProjects(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "registry", "project.list", reply="ProjectPage")

    # active by default; archived, deleted or any.
    state: str = ""
    cursor: str = ""
    limit: int = 0


class ProjectPage(Message):
    items: tuple[Project, ...] = ()
    next_cursor: str = ""


class Point(Message):
    name: str = ""
    value: float = 0.0
    step: Int64 = 0
    at: datetime | None = None


class Series(Message):
    name: str = ""
    # Their names are left empty: they are this series' own.
    points: tuple[Point, ...] = ()
    min: float = 0.0
    max: float = 0.0
    last: float = 0.0
    point_count: Int64 = 0


class Run(Message):
    job_id: str = ""
    team_id: str = ""
    project_id: str = ""
    name: str = ""
    state: str = ""
    params: dict[str, str] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)
    # Name -> last value.
    metrics: dict[str, float] = Field(default_factory=dict)
    created_at: datetime | None = None
    ended_at: datetime | None = None
    revision: Int64 = 0


class LogRun(Message):
    """A point again with the same attempt, name and step replaces the older one; an older attempt's is refused.
    The answer holds what this call logged, not the whole run. Attempt 0 is the present one."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "run.log", reply="Run")

    job_id: str = ""
    attempt: int = 0
    points: tuple[Point, ...] = ()
    params: dict[str, str] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)


class RunLogged(Message):
    ROUTE: ClassVar[Route] = Route(Kind.EVENT, "registry", "run.logged")

    job_id: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)


class Usage(Message):
    """What one attempt uses of its node, as points named system/... whose steps are seconds since its start."""

    job_id: str = ""
    attempt: int = 0
    points: tuple[Point, ...] = ()


class RecordUsage(Message):
    """What one team's attempts on a node use. Nothing is kept of runs that are not known or have a newer attempt."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "run.record_usage", reply="UsageRecorded")

    usages: tuple[Usage, ...] = ()


class UsageRecorded(Message):
    run_count: int = 0


class GetRun(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "registry", "run.get", reply="Run")

    job_id: str = ""


class GetMetrics(Message):
    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "registry", "run.list_metrics", reply="MetricPage")

    job_id: str = ""
    # Empty for all.
    name: str = ""
    # Thinned evenly to at most this many points a series, first, last and extremes kept; 1,000 by default, never
    # under 4, and fewer when many series share one answer.
    max_points: int = 0
    # Only names that begin with this.
    prefix: str = ""
    # Only the newest so many points of each series; 0 for all.
    newest: int = 0


class MetricPage(Message):
    items: tuple[Series, ...] = ()


class Secret(Message):
    """All that is ever shown of a secret."""

    id: str = ""
    team_id: str = ""
    # Empty: of the whole team. A project's own goes before the team's of the same name.
    project_id: str = ""
    name: str = ""
    # Counts its values; each one that differs from the last is one more.
    version: int = 0
    created_by: str = ""
    created_at: datetime | None = None
    updated_by: str = ""
    updated_at: datetime | None = None


class SetSecret(Message):
    """The same value again changes nothing."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "secret.set", reply="Secret")

    project_id: str = ""
    name: str = ""
    value: str = Field(default="", repr=False)


class DeleteSecret(Message):
    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "secret.delete", reply="Secret")

    project_id: str = ""
    name: str = ""


class ListSecrets(Message):
    """The team's, and those of the project when one is named."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "registry", "secret.list", reply="SecretPage")

    project_id: str = ""
    cursor: str = ""
    limit: int = 0


class CheckSecrets(Message):
    """What a job of the project would get by these names; refused when there is none for one of them."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "registry", "secret.check", reply="SecretPage")

    project_id: str = ""
    names: tuple[str, ...] = ()


class SecretPage(Message):
    items: tuple[Secret, ...] = ()
    next_cursor: str = ""


class RevealSecrets(Message):
    """Asked by the node agent that starts an attempt. Who it says it is counts for nothing: the attempt's token decides
    whose secrets these are, the job's template which of them, and only the holder of the key can read the answer."""

    ROUTE: ClassVar[Route] = Route(Kind.REQUEST, "registry", "secret.reveal", reply="RevealedSecrets")

    token_hash: str = ""
    names: tuple[str, ...] = ()
    # X25519, raw, in base64; made for this one question.
    public_key: str = ""


class RevealedSecret(Message):
    name: str = ""
    version: int = 0
    # The value, by HPKE (RFC 9180: X25519, HKDF-SHA256, AES-256-GCM) with the name as its info, in base64.
    sealed: str = Field(default="", repr=False)


class RevealedSecrets(Message):
    items: tuple[RevealedSecret, ...] = ()


class GetService(Message):
    """Answered by every service: the subject carries the service's own name instead of the owner's."""

    ROUTE: ClassVar[Route] = Route(Kind.QUERY, "each", "service.get", reply="ServiceStatus")


class ServiceStatus(Message):
    name: str = ""
    version: str = ""
    ready: bool = False
    detail: str = ""
    uptime_s: float = 0.0
    outbox_waiting: Int64 = 0
    dead_letters: Int64 = 0


MESSAGES: tuple[type[Message], ...] = (
    Principal,
    User,
    Team,
    Token,
    AuthenticateToken,
    CreateToken,
    RevokeToken,
    ListTokens,
    TokenPage,
    TokenRevoked,
    CreateSignIn,
    SignIn,
    RedeemSignIn,
    SignOut,
    Resources,
    Environment,
    Container,
    Source,
    Retry,
    Role,
    Gang,
    Input,
    ModelOutput,
    JobTemplate,
    TimelineEntry,
    Member,
    Attempt,
    Job,
    JobQueued,
    JobStarting,
    JobRunning,
    JobUnreachable,
    JobSucceeded,
    JobFailed,
    JobCancelled,
    JobTimedOut,
    SubmitJob,
    OrderJob,
    StopJob,
    HaltJob,
    GetJob,
    JobDetail,
    ListJobs,
    JobPage,
    RetryJob,
    CloneJob,
    ExplainJob,
    NodeRoom,
    Holder,
    JobExplanation,
    Revision,
    Deployment,
    CreateDeployment,
    DeleteDeployment,
    GetDeployment,
    ListDeployments,
    DeploymentPage,
    DeploymentCreated,
    DeploymentStarting,
    DeploymentReady,
    DeploymentFailed,
    DeploymentDeleted,
    OpenDoor,
    Door,
    DoorOpened,
    GetFrontDoorPass,
    FrontDoorPass,
    Execution,
    Seat,
    StartExecution,
    StopExecution,
    ReportExecution,
    ExecutionRunning,
    ExecutionFinishing,
    ExecutionEnded,
    ListExecutions,
    ExecutionPage,
    AuthenticateAttempt,
    Experiment,
    ExperimentCreated,
    StartExperiment,
    GetExperiment,
    ListExperiments,
    ExperimentPage,
    File,
    Fileset,
    OpenFileset,
    FilesetGrant,
    SealFileset,
    FilesetSealed,
    GetFileset,
    ListFiles,
    FilePage,
    LogLine,
    LogBatch,
    LogSlice,
    LogFrame,
    LogSealed,
    GetLog,
    LogPage,
    MachineType,
    ListMachines,
    MachinePage,
    ModelVersion,
    Model,
    RegisterModel,
    ModelVersionRegistered,
    GetModel,
    ModelDetail,
    GetModelVersion,
    ListModels,
    ModelPage,
    Node,
    NodesReported,
    ListNodes,
    NodePage,
    DrainNode,
    NodeToken,
    CreateNodeToken,
    CheckNodeToken,
    AdmitNode,
    NodeGrant,
    Demand,
    DemandChanged,
    Project,
    ProjectCreated,
    ProjectUpdated,
    ProjectArchived,
    ProjectDeleted,
    ProjectRestored,
    ProjectMoved,
    ProjectPurged,
    CreateProject,
    UpdateProject,
    ArchiveProject,
    DeleteProject,
    RestoreProject,
    MoveProject,
    GetProject,
    ListProjects,
    ProjectPage,
    Point,
    Series,
    Run,
    LogRun,
    RunLogged,
    Usage,
    RecordUsage,
    UsageRecorded,
    GetRun,
    GetMetrics,
    MetricPage,
    Secret,
    SetSecret,
    DeleteSecret,
    ListSecrets,
    CheckSecrets,
    SecretPage,
    RevealSecrets,
    RevealedSecret,
    RevealedSecrets,
    GetService,
    ServiceStatus,
)
