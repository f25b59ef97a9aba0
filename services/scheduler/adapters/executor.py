"""The executor, asked over the bus."""

from __future__ import annotations

from collections.abc import Sequence

from libs.common.bus import Bus
from libs.common.contracts.messages import (
    Execution,
    ExecutionPage,
    ListExecutions,
    ListNodes,
    NodePage,
    Principal,
)


class BusExecutor:
    """Answers `ports.Executor` by queries."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def executions(self, team_id: str, attempt_ids: Sequence[str]) -> tuple[Execution, ...]:
        question = ListExecutions(attempt_ids=tuple(attempt_ids))
        return (await self._bus.ask(question, ExecutionPage, _scheduler(team_id))).items

    async def nodes(self) -> NodePage:
        return await self._bus.ask(ListNodes(), NodePage, _scheduler(""))


def _scheduler(team_id: str) -> Principal:
    return Principal(kind="service", id="scheduler", team_id=team_id)
