"""What serving listens to, and who may ask."""

from __future__ import annotations

from typing import Any

from libs.common.contracts.messages import (
    CreateDeployment,
    DeleteDeployment,
    GetDeployment,
    GetFrontDoorPass,
    GetJob,
    GetLog,
    HaltJob,
    JobCancelled,
    JobFailed,
    JobQueued,
    JobRunning,
    JobStarting,
    JobSucceeded,
    JobTimedOut,
    ListDeployments,
    ListFiles,
    NodesReported,
    OrderJob,
)
from libs.common.routing import INTERNAL, Route, Routes, Rule
from services.serving.handlers import Handlers

READ = Rule(role="viewer", scope="read")
WRITE = Rule(role="member", scope="write")


def routes(handlers: Handlers | None = None) -> Routes:
    """Without handlers for whoever only reads subjects and rules: permissions, documents, tests."""
    do: Any = handlers or Handlers
    return Routes(
        "serving",
        (
            Route(CreateDeployment, do.create_deployment, WRITE),
            Route(DeleteDeployment, do.delete_deployment, WRITE),
            Route(GetDeployment, do.get_deployment, READ),
            Route(ListDeployments, do.list_deployments, READ),
            Route(JobQueued, do.note_job, INTERNAL),
            Route(JobStarting, do.note_job, INTERNAL),
            Route(JobRunning, do.note_job, INTERNAL),
            Route(JobSucceeded, do.note_job, INTERNAL),
            Route(JobFailed, do.note_job, INTERNAL),
            Route(JobCancelled, do.note_job, INTERNAL),
            Route(JobTimedOut, do.note_job, INTERNAL),
            Route(NodesReported, do.note_nodes, INTERNAL),
        ),
        sends=(OrderJob, HaltJob, ListFiles, GetJob, GetLog, GetFrontDoorPass),
    )
