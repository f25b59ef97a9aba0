"""What the executor and its node agents listen to and send."""

from __future__ import annotations

from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    AdmitNode,
    AuthenticateAttempt,
    CheckNodeToken,
    CreateNodeToken,
    DemandChanged,
    DrainNode,
    GetLog,
    ListExecutions,
    ListFiles,
    ListNodes,
    LogFrame,
    LogSealed,
    OpenFileset,
    RegisterModel,
    ReportExecution,
    SealFileset,
    StartExecution,
    StopExecution,
)
from libs.common.routing import GATEWAY_ONLY, INTERNAL, Prepare, Route, Routes, Rule
from services.executor import handlers

# Node agents have a NATS user of their own, which may send this and nothing else.
AGENT_SENDS: tuple[type[Message], ...] = (
    LogFrame,
    ReportExecution,
    ListFiles,
    OpenFileset,
    SealFileset,
    RegisterModel,
)

_FOR_RECONCILING = Rule(role=None, scope="internal", services=frozenset({"scheduler"}))
_LEAD = Rule(role="admin", scope="write")
_FOR_VIEWERS = Rule(role="viewer", scope="read", services=frozenset({"gateway", "scheduler"}))


def routes(prepare_ticket: Prepare | None = None) -> Routes:
    """The routes. Without `prepare_ticket`, which needs a built service, no machine can be invited."""
    return Routes(
        "executor",
        (
            Route(StartExecution, handlers.accept_execution, INTERNAL),
            Route(StopExecution, handlers.stop_execution, INTERNAL),
            Route(ReportExecution, handlers.apply_report, INTERNAL),
            Route(LogSealed, handlers.note_sealed_log, INTERNAL),
            Route(ListExecutions, handlers.list_executions, _FOR_RECONCILING),
            Route(AuthenticateAttempt, handlers.authenticate_attempt, GATEWAY_ONLY),
            Route(CreateNodeToken, handlers.invite_node, _LEAD, prepare=prepare_ticket),
            Route(CheckNodeToken, handlers.authenticate_node, GATEWAY_ONLY, prepare=prepare_ticket),
            Route(AdmitNode, handlers.admit_node, GATEWAY_ONLY, prepare=prepare_ticket),
            Route(DemandChanged, handlers.learn_demand, INTERNAL),
            Route(DrainNode, handlers.drain_node, _LEAD),
            Route(ListNodes, handlers.list_nodes, _FOR_VIEWERS),
        ),
        sends=(GetLog,),
    )
