"""What is said where there is no head, and what calls that hang hold up: nobody. Needs no Ray that runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Mapping

import pytest

from services.executor.adapters.cluster.ray_agent import HeadQuestion
from services.executor.adapters.cluster.ray_cluster import RayCluster, connect
from services.executor.adapters.cluster.ray_connection import STARTING, RayConnection
from services.executor.adapters.cluster.ray_nodes import RayNodes
from services.executor.adapters.cluster.ray_reservations import RayReservations
from services.executor.ports import AgentConfig, ClusterAway, NodeView, Reservation
from tests.unit.executor.cluster_suite import eventually, reservation

pytestmark = pytest.mark.unit

CONFIG = AgentConfig("", "", "", "", "", "", "")


class OpenConnection(RayConnection):
    """To no head at all."""

    def join(self) -> None:
        return

    def leave(self) -> None:
        return


class HangingNodes(RayNodes):
    """Can be looked at; calls to agents hang until `answers` is set."""

    def __init__(self, connection: RayConnection, answers: threading.Event) -> None:
        super().__init__(connection, CONFIG, "nabla")
        self._answers = answers

    def look(self, believed: Mapping[str, Mapping[str, str]], resting: Collection[str]) -> tuple[NodeView, ...]:
        return (NodeView("node1", "host", 1.0, 1, 0.0),)

    def call(self, node_id: str, method: str, *args: object) -> None:
        self._answers.wait()


class HangingReservations(RayReservations):
    def __init__(self, connection: RayConnection, answers: threading.Event) -> None:
        super().__init__(connection, lambda _: True)
        self._answers = answers

    def reserve(self, wanted: Reservation) -> tuple[int, ...]:
        self._answers.wait()
        return ()


async def test_nodes_are_looked_at_while_reservations_and_agents_hang() -> None:
    answers, connection = threading.Event(), OpenConnection(lambda: "head:1", "nabla")
    cluster = RayCluster(connection, HangingNodes(connection, answers), HangingReservations(connection, answers))
    hanging: list[asyncio.Task[object]] = [
        asyncio.create_task(cluster.reserve(reservation("node1"))) for _ in range(40)
    ]
    hanging += [asyncio.create_task(cluster.drop("node1", "at1")) for _ in range(40)]
    await asyncio.sleep(0)
    try:
        assert len(await cluster.look({})) == 1
    finally:
        answers.set()
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        await cluster.close()


async def test_a_head_that_hangs_is_asked_once_and_again_when_it_has_answered() -> None:
    answers, asked = threading.Event(), list[int]()

    def ask() -> bool:
        asked.append(threading.get_ident())
        return answers.wait()

    question = HeadQuestion(ask, within_s=0.01)
    assert [await question.answered() for _ in range(3)] == [False] * 3
    assert len(asked) <= 1
    answers.set()
    await eventually(question.answered)
    assert len(set(asked)) == 1


@pytest.mark.parametrize(
    ("address", "said"),
    [("", STARTING), ("127.0.0.1:1", "the Ray head at 127.0.0.1:1 does not answer yet")],
)
async def test_a_head_that_was_never_there_is_named_where_its_address_is_known(address: str, said: str) -> None:
    cluster = connect(lambda: address, CONFIG, "nabla")
    with pytest.raises(ClusterAway) as away:
        await cluster.look({})
    assert str(away.value) == said
    await cluster.close()
