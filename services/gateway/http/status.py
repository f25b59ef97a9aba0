"""How the platform is, for people and for whoever watches it."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from pydantic import BaseModel

from libs.common.contracts.messages import (
    GetService,
    ListMachines,
    ListNodes,
    MachinePage,
    Node,
    NodePage,
    Principal,
    ServiceStatus,
)
from libs.common.errors import Unavailable
from libs.common.version import VERSION
from services.gateway.http.errors import RESPONSES
from services.gateway.http.parts import API, Caller, Wired
from services.gateway.ports import Owners

SERVICES = ("gateway", "scheduler", "executor", "storage", "registry", "serving")
TIMEOUT_S = 1.0

public = APIRouter(prefix=API, tags=["status"])
router = APIRouter(prefix=API, tags=["status"], responses=RESPONSES)


class Health(BaseModel):
    status: str = "ok"
    installation_id: str = ""


class PlatformStatus(BaseModel):
    version: str = VERSION
    isolation: str = ""
    isolation_detail: str = ""
    services: tuple[ServiceStatus, ...] = ()
    nodes: tuple[Node, ...] = ()
    nodes_detail: str = ""


@public.get("/health", summary="Whether the API answers, and of which installation; needs no token")
async def health(parts: Wired) -> Health:
    return Health(installation_id=parts.settings.installation_id)


@router.get("/status", summary="All services and nodes, and how well jobs are isolated")
async def status(caller: Caller, parts: Wired) -> PlatformStatus:
    return await platform_status(parts.owners, caller)


@router.get("/machines", summary="The machine types, and how many jobs of each could start now")
async def list_machines(caller: Caller, parts: Wired) -> MachinePage:
    return await parts.owners.ask(ListMachines(), MachinePage, caller)


async def platform_status(owners: Owners, caller: Principal) -> PlatformStatus:
    """Asks everybody at once; whoever is silent for a second counts as not ready."""
    asking = (_service(owners, caller, name) for name in SERVICES)
    nodes, services = await asyncio.gather(_nodes(owners, caller), asyncio.gather(*asking))
    isolation, detail = weakest_isolation(nodes.items)
    return PlatformStatus(
        isolation=isolation,
        isolation_detail=detail,
        services=tuple(services),
        nodes=nodes.items,
        nodes_detail=nodes.detail,
    )


def weakest_isolation(nodes: tuple[Node, ...]) -> tuple[str, str]:
    """The class that may be promised to every job, and why it is not the best one."""
    classes = [(node.isolation, node.isolation_detail) for node in nodes if node.isolation]
    return next((each for each in classes if each[0] == "process"), classes[0] if classes else ("", ""))


async def _service(owners: Owners, caller: Principal, name: str) -> ServiceStatus:
    try:
        return await owners.ask(GetService(), ServiceStatus, caller, service=name, timeout_s=TIMEOUT_S)
    except Unavailable:
        return ServiceStatus(name=name, ready=False, detail="It does not answer: it is starting, or it is down.")


async def _nodes(owners: Owners, caller: Principal) -> NodePage:
    try:
        return await owners.ask(ListNodes(), NodePage, caller, timeout_s=TIMEOUT_S)
    except Unavailable:
        return NodePage(detail="The executor does not answer.")
