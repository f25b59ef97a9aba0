"""The audit of write requests, put around their handlers by the routes so that none can forget it."""

from __future__ import annotations

from typing import Any, cast

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import DoorOpened
from libs.common.routing import Handler
from services.registry.store.unit import CatalogueUnit


async def record_door(message: DoorOpened, unit: CatalogueUnit, call: Envelope) -> None:
    """Who was let into which running job; the executor has granted it."""
    await unit.audit(call, message, message.job_id, call.team_id, actor=f"user:{message.by}")


def audited(handler: Handler, *, attempts: bool = True) -> Handler:
    """The handler, with an audit row in the transaction of each request that it grants.

    Args:
        attempts: whether those of running jobs are kept, too; what they log is its own record.
    """

    async def grant(message: Message, unit: CatalogueUnit, call: Envelope) -> Message:
        reply: Any = await handler(message, unit, call)
        if call.principal.kind == "attempt" and not attempts:
            return cast("Message", reply)
        team_id = call.principal.team_id or getattr(reply, "team_id", "")
        await unit.audit(call, message, getattr(reply, "id", "") or getattr(reply, "job_id", ""), team_id)
        return cast("Message", reply)

    grant.__name__ = getattr(handler, "__name__", "grant")
    return grant
