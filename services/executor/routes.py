"""What the executor and its node agents listen to and send."""

from __future__ import annotations

from typing import Any

from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    AdmitNode,
    AuthenticateAttempt,
    CheckNodeToken,
    CreateNodeToken,
    DemandChanged,
    DrainNode,
    GetFrontDoorPass,
    GetLog,
    ListExecutions,
    ListFiles,
    ListNodes,
    LogFrame,
    LogSealed,
    OpenDoor,
    OpenFileset,
    RecordUsage,
    RegisterModel,
    ReportExecution,
    RevealSecrets,
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
    RevealSecrets,
    RecordUsage,
)

_FOR_RECONCILING = Rule(role=None, scope="internal", services=frozenset({"scheduler"}))
# The registry asks whose secrets a node may have.
_FOR_TOKENS = Rule(role=None, scope="internal", services=frozenset({"gateway", "registry"}))
_FOR_THE_PROXY = Rule(role=None, scope="internal", services=frozenset({"serving"}))
_ENTER = Rule(role="member", scope="write")
# Nodes belong to the installation, whose jobs of all teams run there.
_OPERATE = Rule(role="admin", scope="write", operator=True)
_FOR_VIEWERS = Rule(role="viewer", scope="read", services=frozenset({"gateway", "scheduler"}))


def routes(prepare_ticket: Prepare | None = None, doors: handlers.Doors | None = None) -> Routes:
    """The routes. Without the arguments, which need a built service, for whoever only reads subjects and rules."""
    lets_in: Any = doors or handlers.Doors
    return Routes(
        "executor",
        (
            Route(StartExecution, handlers.accept_execution, INTERNAL),
            Route(StopExecution, handlers.stop_execution, INTERNAL),
            Route(ReportExecution, handlers.apply_report, INTERNAL),
            Route(LogSealed, handlers.note_sealed_log, INTERNAL),
            Route(ListExecutions, handlers.list_executions, _FOR_RECONCILING),
            Route(AuthenticateAttempt, handlers.authenticate_attempt, _FOR_TOKENS),
            Route(CreateNodeToken, handlers.invite_node, _OPERATE, prepare=prepare_ticket),
            Route(CheckNodeToken, handlers.authenticate_node, GATEWAY_ONLY, prepare=prepare_ticket),
            Route(AdmitNode, handlers.admit_node, GATEWAY_ONLY, prepare=prepare_ticket),
            Route(DemandChanged, handlers.learn_demand, INTERNAL),
            Route(DrainNode, handlers.drain_node, _OPERATE),
            Route(OpenDoor, lets_in.open_door, _ENTER),
            Route(GetFrontDoorPass, lets_in.sign_front_door, _FOR_THE_PROXY),
            Route(ListNodes, handlers.list_nodes, _FOR_VIEWERS),
        ),
        sends=(GetLog,),
    )
