"""What the scheduler listens to, and who may ask."""

from __future__ import annotations

from libs.common.contracts.messages import (
    CloneJob,
    ExecutionEnded,
    ExecutionFinishing,
    ExecutionRunning,
    ExplainJob,
    GetExperiment,
    GetJob,
    GetProject,
    HaltJob,
    ListExecutions,
    ListExperiments,
    ListJobs,
    ListMachines,
    ListNodes,
    NodesReported,
    OrderJob,
    ProjectArchived,
    ProjectCreated,
    ProjectDeleted,
    ProjectMoved,
    ProjectRestored,
    ProjectUpdated,
    RetryJob,
    StartExecution,
    StartExperiment,
    StopExecution,
    StopJob,
    SubmitJob,
)
from libs.common.routing import INTERNAL, Route, Routes, Rule
from services.scheduler import handlers

WRITE = Rule(role="member", scope="write")
READ = Rule(role="viewer", scope="read", services=frozenset({"gateway", "registry"}))
# The other services ask after a job whose events they may have missed; a running job may see itself.
READ_JOB = Rule(
    role="viewer",
    scope="read",
    attempts=True,
    services=frozenset({"gateway", "executor", "registry", "serving", "storage"}),
)


def routes() -> Routes:
    return Routes(
        "scheduler",
        (
            Route(SubmitJob, handlers.submit_job, WRITE),
            Route(StopJob, handlers.stop_job, WRITE),
            Route(RetryJob, handlers.retry_job, WRITE),
            Route(CloneJob, handlers.clone_job, WRITE),
            Route(StartExperiment, handlers.start_experiment, WRITE),
            Route(GetJob, handlers.get_job, READ_JOB),
            Route(ListJobs, handlers.list_jobs, READ),
            Route(ExplainJob, handlers.explain_job, READ),
            Route(ListMachines, handlers.list_machines, READ),
            Route(GetExperiment, handlers.get_experiment, READ),
            Route(ListExperiments, handlers.list_experiments, READ),
            Route(OrderJob, handlers.order_job, INTERNAL),
            Route(HaltJob, handlers.halt_job, INTERNAL),
            Route(NodesReported, handlers.learn_nodes, INTERNAL),
            Route(ExecutionRunning, handlers.follow_report, INTERNAL),
            Route(ExecutionFinishing, handlers.follow_report, INTERNAL),
            Route(ExecutionEnded, handlers.follow_report, INTERNAL),
            Route(ProjectCreated, handlers.learn_project, INTERNAL),
            Route(ProjectUpdated, handlers.learn_project, INTERNAL),
            Route(ProjectArchived, handlers.learn_project, INTERNAL),
            Route(ProjectDeleted, handlers.learn_project, INTERNAL),
            Route(ProjectRestored, handlers.learn_project, INTERNAL),
            Route(ProjectMoved, handlers.learn_project, INTERNAL),
        ),
        sends=(StartExecution, StopExecution, ListExecutions, ListNodes, GetProject),
    )
