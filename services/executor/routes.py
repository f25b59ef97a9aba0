"""What the executor and its node agents listen to and send."""

from __future__ import annotations

from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    AuthenticateAttempt,
    GetLog,
    ListExecutions,
    ListFiles,
    ListNodes,
    LogFrame,
    LogSealed,
    OpenFileset,
    RecordUsage,
    RegisterModel,
    ReportExecution,
    RevealSecrets,
    SealFileset,
    StartExecution,
    StopExecution,
)
from libs.common.routing import INTERNAL, Route, Routes, Rule
from services.executor import handlers

# Node agents have a NATS user of their own, which may send this and nothing else.
AGENT_SENDS: tuple[type[Message], ...] = (
    LogFrame,
    ReportExecution,
    ListFiles,
    OpenFileset,
    SealFileset,
    RegisterModel,
    RevealSecrets,
    RecordUsage,
)

_FOR_RECONCILING = Rule(role=None, scope="internal", services=frozenset({"scheduler"}))
# The registry asks whose secrets a node may have.
_FOR_TOKENS = Rule(role=None, scope="internal", services=frozenset({"gateway", "registry"}))
_FOR_VIEWERS = Rule(role="viewer", scope="read", services=frozenset({"gateway", "scheduler"}))


def routes() -> Routes:
    return Routes(
        "executor",
        (
            Route(StartExecution, handlers.accept_execution, INTERNAL),
            Route(StopExecution, handlers.stop_execution, INTERNAL),
            Route(ReportExecution, handlers.apply_report, INTERNAL),
            Route(LogSealed, handlers.note_sealed_log, INTERNAL),
            Route(ListExecutions, handlers.list_executions, _FOR_RECONCILING),
            Route(AuthenticateAttempt, handlers.authenticate_attempt, _FOR_TOKENS),
            Route(ListNodes, handlers.list_nodes, _FOR_VIEWERS),
        ),
        sends=(GetLog,),
    )
