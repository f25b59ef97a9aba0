"""What every cluster promises, whether it is Ray or a fake. Inherit, and give the fixtures `cluster` and `node_id`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from libs.common.contracts.messages import JobTemplate
from libs.common.ids import new_id
from services.executor.ports import Cluster, NodeAway, NoRoom, Part, Reservation, StartOrder


def reservation(node_id: str, **amounts: float) -> Reservation:
    return gang_reservation(node_id, amounts or {"CPU": 1.0})


def gang_reservation(node_id: str, *amounts: dict[str, float]) -> Reservation:
    return Reservation(new_id("attempt"), tuple(Part(node_id, each) for each in amounts))


def order(*command: str) -> StartOrder:
    return StartOrder(
        attempt_id=new_id("attempt"),
        job_id=new_id("job"),
        number=1,
        team_id="t0team",
        project_id="pr0",
        experiment_id="",
        template=JobTemplate(command=command or ("sleep 30",)),
        token="nbla_secret",
        team_uid=61001,
    )


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.05)


class ClusterSuite:
    async def test_a_living_node_has_an_agent(self, cluster: Cluster, node_id: str) -> None:
        (node,) = await cluster.look({})
        assert node.id == node_id
        assert node.agent
        assert (node.cpu_count, node.gpu_count) == (4.0, 2.0)

    async def test_a_reservation_is_held_until_it_is_released(self, cluster: Cluster, node_id: str) -> None:
        wanted = reservation(node_id)
        assert await cluster.reserve(wanted) == ((),)
        assert await cluster.reserve(wanted) == ((),)
        assert wanted.attempt_id in await cluster.reserved()
        await cluster.release(wanted.attempt_id)
        await cluster.release(wanted.attempt_id)
        assert wanted.attempt_id not in await cluster.reserved()

    async def test_a_node_that_is_not_there_is_away(self, cluster: Cluster, node_id: str) -> None:
        with pytest.raises(NodeAway):
            await cluster.reserve(reservation("0" * 56))

    async def test_what_does_not_fit_waits_until_there_is_room(self, cluster: Cluster, node_id: str) -> None:
        first, second = reservation(node_id, CPU=3.0), reservation(node_id, CPU=3.0)
        await cluster.reserve(first)
        with pytest.raises(NoRoom):
            await cluster.reserve(second)
        await cluster.release(first.attempt_id)

        async def fits() -> bool:
            try:
                await cluster.reserve(second)
            except NoRoom:
                return False
            return True

        await eventually(fits)
        await cluster.release(second.attempt_id)

    async def test_a_waiting_reservation_can_be_given_up(self, cluster: Cluster, node_id: str) -> None:
        wanted = reservation(node_id, CPU=100.0)
        with pytest.raises(NoRoom):
            await cluster.reserve(wanted)
        await cluster.release(wanted.attempt_id)
        assert wanted.attempt_id not in await cluster.reserved()

    async def test_gpus_are_given_once(self, cluster: Cluster, node_id: str) -> None:
        both = [reservation(node_id, CPU=1.0, GPU=1.0) for _ in range(2)]
        given = [await cluster.reserve(wanted) for wanted in both]
        assert sorted(given) == [((0,),), ((1,),)]
        assert [await cluster.reserve(wanted) for wanted in both] == given
        for wanted in both:
            await cluster.release(wanted.attempt_id)

    async def test_a_gang_is_reserved_whole_or_not_at_all(self, cluster: Cluster, node_id: str) -> None:
        room, small = reservation(node_id, CPU=1.0), {"CPU": 1.0}
        await cluster.reserve(room)
        gang = gang_reservation(node_id, small, small, {"CPU": 2.0})
        with pytest.raises(NoRoom):
            await cluster.reserve(gang)
        between = reservation(node_id, CPU=3.0)
        assert await cluster.reserve(between) == ((),)
        for held in (room, between):
            await cluster.release(held.attempt_id)

        async def fits() -> bool:
            try:
                return await cluster.reserve(gang) == ((), (), ())
            except NoRoom:
                return False

        await eventually(fits)
        await cluster.release(gang.attempt_id)

    async def test_each_rank_of_a_gang_has_gpus_of_its_own(self, cluster: Cluster, node_id: str) -> None:
        gang = gang_reservation(node_id, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0})
        given = await cluster.reserve(gang)
        assert (sorted(given[::2]), given[1]) == ([(0,), (1,)], ())
        assert await cluster.reserve(gang) == given
        await cluster.release(gang.attempt_id)

    async def test_an_attempt_is_started_once_stopped_and_dropped(self, cluster: Cluster, node_id: str) -> None:
        asked = order()
        await cluster.start(node_id, asked)
        await cluster.start(node_id, asked)

        async def state() -> str:
            (node,) = await cluster.look({node_id: {asked.attempt_id: "asked"}})
            assert node.agent
            return next((each.state for each in node.agent.news if each.attempt_id == asked.attempt_id), "")

        async def runs() -> bool:
            return await state() == "running"

        async def ended() -> bool:
            return await state() == "ended"

        await eventually(runs)
        assert await cluster.stop(node_id, asked.attempt_id, 5.0, "enough")
        await eventually(ended)
        await cluster.drop(node_id, asked.attempt_id)
        (node,) = await cluster.look({})
        assert node.agent
        assert asked.attempt_id not in node.agent.held

    async def test_an_attempt_stopped_before_its_start_does_not_run(self, cluster: Cluster, node_id: str) -> None:
        asked = order()
        assert not await cluster.stop(node_id, asked.attempt_id, 5.0, "enough")
        await cluster.start(node_id, asked)

        async def stopped() -> bool:
            (node,) = await cluster.look({node_id: {asked.attempt_id: "asked"}})
            assert node.agent
            return any((each.attempt_id, each.reason) == (asked.attempt_id, "stopped") for each in node.agent.news)

        await eventually(stopped)
