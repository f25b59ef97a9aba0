"""Which handler each message goes to, and who may send it."""

from __future__ import annotations

from typing import Any

from libs.common.contracts.messages import (
    GetFileset,
    GetJob,
    GetLog,
    JobCancelled,
    JobFailed,
    JobStarting,
    JobSucceeded,
    JobTimedOut,
    ListFiles,
    LogFrame,
    OpenFileset,
    SealFileset,
)
from libs.common.routing import INTERNAL, Route, Routes, Rule
from services.storage.handlers import FilesetHandlers
from services.storage.log_handlers import LogHandlers

ACTING = frozenset({"executor", "serving"})
ASKING = ACTING | {"registry", "scheduler", "gateway"}
WRITE = Rule(role="member", scope="write", attempts=True, services=ACTING)
READ = Rule(role="viewer", scope="read", attempts=True, services=ASKING)


def routes(file_handlers: FilesetHandlers | None = None, log_handlers: LogHandlers | None = None) -> Routes:
    """Without handlers for whoever only reads subjects and rules: permissions, documents, tests."""
    filesets: Any = file_handlers or FilesetHandlers
    logs: Any = log_handlers or LogHandlers
    return Routes(
        "storage",
        (
            Route(OpenFileset, filesets.open_fileset, WRITE, prepare=filesets.prepare_open),
            Route(SealFileset, filesets.seal_fileset, WRITE, prepare=filesets.prepare_seal),
            Route(GetFileset, filesets.get_fileset, READ),
            Route(ListFiles, filesets.list_files, READ),
            Route(GetLog, logs.get_log, READ, prepare=logs.prepare_page),
            Route(LogFrame, logs.take_frame, INTERNAL, repeatable=True),
            Route(JobStarting, logs.note_attempt, INTERNAL),
            Route(JobSucceeded, logs.end_log, INTERNAL),
            Route(JobFailed, logs.end_log, INTERNAL),
            Route(JobCancelled, logs.end_log, INTERNAL),
            Route(JobTimedOut, logs.end_log, INTERNAL),
        ),
        sends=(GetJob,),
    )
