"""Endings that no node agent reports."""

from __future__ import annotations

from libs.common.store import Store
from services.executor.handlers import advance
from services.executor.store import ExecutionRow, ExecutorUnit

ExecutorStore = Store[ExecutorUnit]


async def end_execution(store: ExecutorStore, execution_id: str, reason: str, detail: str) -> None:
    """Ends an execution that no agent will report the end of."""

    async def end(unit: ExecutorUnit) -> None:
        await advance(unit, await load(unit, execution_id), "end", reason=reason, detail=detail)

    await store.run(end)


async def load(unit: ExecutorUnit, execution_id: str) -> ExecutionRow:
    row = await unit.execution(execution_id)
    assert row, "only what ended long ago is ever deleted"
    return row
