"""What the API answers, as immutable records. The shapes are those of proto/nabla/**."""

from __future__ import annotations

from datetime import datetime
from typing import Mapping, Optional, Tuple

from nabla.record import EMPTY, Record


class Principal(Record):
    """Who a token speaks for."""

    kind: str = ""
    id: str = ""
    name: str = ""
    team_id: str = ""
    role: str = ""
    scopes: Tuple[str, ...] = ()
    project_id: str = ""
    job_id: str = ""
    attempt: int = 0


class Token(Record):
    id: str = ""
    name: str = ""
    user_id: str = ""
    team_id: str = ""
    scopes: Tuple[str, ...] = ()
    created_at: Optional[datetime] = None
    expires_at: Optional[datetime] = None
    revoked_at: Optional[datetime] = None
    secret: str = ""


class Secret(Record):
    """All that is ever shown of a secret; without a project it is the whole team's."""

    id: str = ""
    team_id: str = ""
    project_id: str = ""
    name: str = ""
    version: int = 0
    created_by: str = ""
    created_at: Optional[datetime] = None
    updated_by: str = ""
    updated_at: Optional[datetime] = None


class SignInLink(Record):
    """Opens the web interface once, signed in."""

    url: str = ""
    expires_at: Optional[datetime] = None


class Project(Record):
    id: str = ""
    team_id: str = ""
    name: str = ""
    description: str = ""
    state: str = ""
    created_by: str = ""
    created_at: Optional[datetime] = None
    updated_at: Optional[datetime] = None
    revision: int = 0


class File(Record):
    """One file of a file set; `url` is where to PUT or GET it, for some minutes."""

    path: str = ""
    size_bytes: int = 0
    md5: str = ""
    sha256: str = ""
    url: str = ""


class Fileset(Record):
    id: str = ""
    team_id: str = ""
    project_id: str = ""
    kind: str = ""
    state: str = ""
    digest: str = ""
    file_count: int = 0
    size_bytes: int = 0
    job_id: str = ""
    attempt: int = 0
    created_at: Optional[datetime] = None
    sealed_at: Optional[datetime] = None
    revision: int = 0


class FilesetGrant(Record):
    """A file set and what of it is still to be uploaded."""

    fileset: Fileset = Fileset()
    uploads: Tuple[File, ...] = ()


class Resources(Record):
    """Zero means no wish."""

    cpu_count: float = 0.0
    memory_bytes: int = 0
    gpu_count: float = 0.0
    gpu_model: str = ""
    gpu_memory_bytes: int = 0


class Environment(Record):
    """Where the job's `python` comes from: `default`, `venv` (a path), `requirements` (their text) or `workspace` (the
    path of a file in it)."""

    kind: str = "default"
    path: str = ""
    requirements: str = ""
    python: str = ""


class Container(Record):
    """An OCI image to run the job in, or a Dockerfile of the workspace to build one from."""

    image: str = ""
    dockerfile: str = ""
    user: str = ""
    registry_username: str = ""
    registry_password: str = ""
    build_args: Mapping[str, str] = EMPTY
    built: str = ""


class Source(Record):
    """Where the workspace is fetched from on the node: `git` or `s3`."""

    kind: str = ""
    url: str = ""
    ref: str = ""
    username: str = ""
    password: str = ""
    endpoint: str = ""


class Retry(Record):
    """Which ends deserve another try: failure, exit:N, out_of_memory, node_lost, start_failure, timed_out."""

    on: Tuple[str, ...] = ()
    delay_s: float = 0.0
    longest_s: float = 0.0


class Role(Record):
    """The processes of one kind in a gang. What is empty is as in the template."""

    name: str = ""
    count: int = 0
    command: Tuple[str, ...] = ()
    resources: Resources = Resources()
    machine_type: str = ""
    container: Container = Container()
    env: Mapping[str, str] = EMPTY


class Gang(Record):
    """Several processes of one job that start together or not at all; `type` is torch, grpc, mpi or ray."""

    type: str = ""
    roles: Tuple[Role, ...] = ()


class ModelOutput(Record):
    """A folder below /artifacts that becomes a model version when the job succeeds."""

    name: str = ""
    path: str = ""
    framework: str = ""


class JobTemplate(Record):
    """Everything one may say about a job."""

    name: str = ""
    command: Tuple[str, ...] = ()
    env: Mapping[str, str] = EMPTY
    resources: Resources = Resources()
    workspace_id: str = ""
    environment: Environment = Environment()
    timeout_s: float = 0.0
    max_retries: int = 0
    models: Tuple[ModelOutput, ...] = ()
    ports: Tuple[int, ...] = ()
    kind: str = "command"
    origin: Mapping[str, str] = EMPTY
    priority: Optional[int] = None
    machine_type: str = ""
    container: Container = Container()
    source: Source = Source()
    network: str = ""
    retry: Retry = Retry()
    max_wait_s: float = 0.0
    gang: Gang = Gang()


class Member(Record):
    """One process of an attempt."""

    rank: int = 0
    role: str = ""
    node_id: str = ""
    state: str = ""
    reason: str = ""
    detail: str = ""
    exit_code: Optional[int] = None
    isolation: str = ""
    peak_memory_bytes: int = 0
    addresses: Mapping[str, str] = EMPTY
    gpu_indices: Tuple[int, ...] = ()


class Attempt(Record):
    id: str = ""
    number: int = 0
    state: str = ""
    node_id: str = ""
    reason: str = ""
    """When ended: exited, stopped, timed_out, out_of_memory, fenced, lost, refused or start_failure."""
    detail: str = ""
    exit_code: Optional[int] = None
    created_at: Optional[datetime] = None
    started_at: Optional[datetime] = None
    ended_at: Optional[datetime] = None
    isolation: str = ""
    peak_memory_bytes: int = 0
    addresses: Mapping[str, str] = EMPTY
    gpu_indices: Tuple[int, ...] = ()
    members: Tuple[Member, ...] = ()
    origin: Mapping[str, str] = EMPTY


class TimelineEntry(Record):
    at: Optional[datetime] = None
    state: str = ""
    detail: str = ""
    attempt: int = 0
    actor: str = ""
    cause: str = ""
    trace_id: str = ""


ENDED_STATES = frozenset({"succeeded", "failed", "cancelled", "timed_out"})


class Job(Record):
    id: str = ""
    team_id: str = ""
    project_id: str = ""
    experiment_id: str = ""
    template: JobTemplate = JobTemplate()
    state: str = ""
    detail: str = ""
    desired_state: str = ""
    revision: int = 0
    created_at: Optional[datetime] = None
    queued_at: Optional[datetime] = None
    started_at: Optional[datetime] = None
    ended_at: Optional[datetime] = None
    exit_code: Optional[int] = None
    attempt: Optional[Attempt] = None
    created_by: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED_STATES


class JobDetail(Record):
    job: Job = Job()
    attempts: Tuple[Attempt, ...] = ()
    timeline: Tuple[TimelineEntry, ...] = ()


class NodeRoom(Record):
    """What is free on a node, seen by one job; `obstacle` is why nothing of it can go there now."""

    node_id: str = ""
    hostname: str = ""
    total: Resources = Resources()
    free: Resources = Resources()
    obstacle: str = ""


class Holder(Record):
    """A job of one's own team that holds part of a node."""

    job_id: str = ""
    name: str = ""
    state: str = ""
    node_ids: Tuple[str, ...] = ()
    holds: Resources = Resources()
    started_at: Optional[datetime] = None


class JobExplanation(Record):
    """Why a job is in its state; all but the first four only for one that waits."""

    job_id: str = ""
    state: str = ""
    summary: str = ""
    cause: str = ""
    needs: Tuple[Resources, ...] = ()
    priority: int = 0
    before: int = 0
    waiting: int = 0
    nodes: Tuple[NodeRoom, ...] = ()
    holders: Tuple[Holder, ...] = ()
    held_by_others: Resources = Resources()
    not_before: Optional[datetime] = None
    give_up_at: Optional[datetime] = None
    advice: str = ""


class MachineType(Record):
    """A named shape; `startable` is how many jobs of it could start now."""

    name: str = ""
    resources: Resources = Resources()
    startable: int = 0
    hostnames: Tuple[str, ...] = ()


class MachinePage(Record):
    """`source` is "file" where the installation names its types, "nodes" where they are those of its nodes."""

    items: Tuple[MachineType, ...] = ()
    source: str = ""
    detail: str = ""


class Door(Record):
    """A ticket for one connection into a running job."""

    path: str = ""
    ticket: str = ""
    expires_at: Optional[datetime] = None
    host_key: str = ""
    job_id: str = ""
    attempt_id: str = ""


class Experiment(Record):
    id: str = ""
    team_id: str = ""
    project_id: str = ""
    name: str = ""
    kind: str = ""
    created_by: str = ""
    created_at: Optional[datetime] = None
    revision: int = 0
    jobs: Tuple[Job, ...] = ()


class LogLine(Record):
    """`sequence` counts from 1 over all attempts and ranks of the job; `stream` is stdout, stderr or nabla. A `cut`
    line goes on in the next one of its stream, attempt and rank."""

    sequence: int = 0
    at: Optional[datetime] = None
    stream: str = "stdout"
    text: str = ""
    attempt: int = 0
    rank: int = 0
    cut: bool = False


class LogPage(Record):
    lines: Tuple[LogLine, ...] = ()
    complete: bool = False
    last_sequence: int = 0


class Point(Record):
    name: str = ""
    value: float = 0.0
    step: int = 0
    at: Optional[datetime] = None


class Series(Record):
    name: str = ""
    points: Tuple[Point, ...] = ()
    min: float = 0.0
    max: float = 0.0
    last: float = 0.0
    point_count: int = 0


class MetricPage(Record):
    items: Tuple[Series, ...] = ()


class Run(Record):
    """The tracked record of a job: parameters, tags and the last value of each metric."""

    job_id: str = ""
    team_id: str = ""
    project_id: str = ""
    name: str = ""
    state: str = ""
    params: Mapping[str, str] = EMPTY
    tags: Mapping[str, str] = EMPTY
    metrics: Mapping[str, float] = EMPTY
    created_at: Optional[datetime] = None
    ended_at: Optional[datetime] = None
    revision: int = 0


class ModelVersion(Record):
    id: str = ""
    model_id: str = ""
    model_name: str = ""
    version: int = 0
    framework: str = ""
    description: str = ""
    fileset_id: str = ""
    size_bytes: int = 0
    digest: str = ""
    job_id: str = ""
    metrics: Mapping[str, float] = EMPTY
    created_by: str = ""
    created_at: Optional[datetime] = None
    project_id: str = ""


class Model(Record):
    id: str = ""
    team_id: str = ""
    project_id: str = ""
    name: str = ""
    description: str = ""
    created_at: Optional[datetime] = None
    revision: int = 0
    latest_version: int = 0
    latest: Optional[ModelVersion] = None


class ModelDetail(Record):
    model: Model = Model()
    versions: Tuple[ModelVersion, ...] = ()


class Revision(Record):
    number: int = 0
    model_id: str = ""
    model_name: str = ""
    model_version: int = 0
    framework: str = ""
    model_fileset_id: str = ""
    bento_fileset_id: str = ""
    state: str = ""
    detail: str = ""
    build_job_id: str = ""
    replica_job_id: str = ""
    created_at: Optional[datetime] = None


class Deployment(Record):
    id: str = ""
    team_id: str = ""
    project_id: str = ""
    name: str = ""
    state: str = ""
    detail: str = ""
    desired_state: str = ""
    revision: Optional[Revision] = None
    path: str = ""
    host: str = ""
    created_by: str = ""
    created_at: Optional[datetime] = None
    ready_at: Optional[datetime] = None
    record_revision: int = 0
    endpoint_token: str = ""
    resources: Resources = Resources()


class ServiceStatus(Record):
    name: str = ""
    version: str = ""
    ready: bool = False
    detail: str = ""
    uptime_s: float = 0.0
    outbox_waiting: int = 0
    dead_letters: int = 0


class Node(Record):
    id: str = ""
    hostname: str = ""
    state: str = ""
    cpu_count: float = 0.0
    memory_bytes: int = 0
    gpu_count: float = 0.0
    gpu_model: str = ""
    isolation: str = ""
    isolation_detail: str = ""
    seen_at: Optional[datetime] = None
    gpu_memory_bytes: int = 0
    address: str = ""
    runtimes: Tuple[str, ...] = ()
    draining: bool = False
    network: str = ""
    cpu_used: float = 0.0
    memory_used_bytes: int = 0
    gpu_used: float = 0.0
    attempt_count: int = 0
    job_ids: Tuple[str, ...] = ()


class NodePage(Record):
    items: Tuple[Node, ...] = ()
    detail: str = ""


class NodeInvitation(Record):
    """How one machine may become a node, once."""

    command: str = ""
    expires_at: Optional[datetime] = None
    python_version: str = ""
    ray_version: str = ""


class Status(Record):
    """The whole installation at a glance."""

    version: str = ""
    isolation: str = ""
    isolation_detail: str = ""
    services: Tuple[ServiceStatus, ...] = ()
    nodes: Tuple[Node, ...] = ()
    nodes_detail: str = ""
