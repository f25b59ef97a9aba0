"""Attempts of several processes in the executor: one reservation, one row and one order for each rank."""

from __future__ import annotations

from typing import Any

import pytest

from libs.common.contracts.gangs import ranks_of
from libs.common.contracts.messages import (
    AuthenticateAttempt,
    Execution,
    Gang,
    JobTemplate,
    ListExecutions,
    LogSealed,
    Principal,
    ReportExecution,
    Resources,
    Role,
    Seat,
    StartExecution,
    StopExecution,
)
from libs.common.ids import secret_hash
from services.executor import handlers
from services.executor.domain.gang import (
    BLOCKS,
    FIRST_PORT,
    PORT_COUNT,
    GangFacts,
    free_block,
    gang_order,
    meeting_port,
    missing_addresses,
    port_of,
)
from tests.unit.executor.bench import TEAM, Bench
from tests.unit.executor.fake_cluster import NODE
from tests.unit.executor.test_executor import start

pytestmark = pytest.mark.unit

TORCH = JobTemplate(
    command=("python train.py",),
    resources=Resources(cpu_count=1, gpu_count=1),
    gang=Gang(type="torch", roles=(Role(name="worker", count=2),)),
)


def gang(*nodes: str, template: JobTemplate = TORCH, **changes: Any) -> StartExecution:
    seats = tuple(Seat(rank=rank, node_id=node) for rank, node in enumerate(nodes))
    return start(node_id=nodes[0], seats=seats, template=template, **changes)


def rank_id(asked: StartExecution, rank: int) -> str:
    return f"{asked.attempt_id}r{rank}"


def report(asked: StartExecution, rank: int, state: str, **facts: Any) -> ReportExecution:
    node_id = asked.seats[rank].node_id
    return ReportExecution(
        execution=Execution(attempt_id=asked.attempt_id, rank=rank, node_id=node_id, state=state, **facts)
    )


@pytest.fixture
async def two_nodes(bench: Bench) -> Bench:
    bench.cluster.alive.add("node2")
    await bench.watcher.look()
    return bench


async def test_a_gang_is_reserved_at_once_and_each_rank_started_on_its_node(two_nodes: Bench) -> None:
    asked = gang(NODE, "node2")
    await two_nodes.deliver(asked)
    await two_nodes.work()
    (held,) = two_nodes.cluster.held.values()
    assert (held.attempt_id, [part.node_id for part in held.parts]) == (asked.attempt_id, [NODE, "node2"])
    for rank in range(2):
        row = await two_nodes.row(rank_id(asked, rank))
        assert (row.state, row.gpu_indices, row.rank, row.attempt_id) == ("starting", [0], rank, asked.attempt_id)
    assert sorted(two_nodes.cluster.attempts) == [(NODE, rank_id(asked, 0)), ("node2", rank_id(asked, 1))]
    first, second = sorted(two_nodes.cluster.orders, key=lambda order: order.rank)
    assert first.token != second.token
    assert first.gang
    assert second.gang
    assert first.gang.peers == second.gang.peers
    assert [peer.address for peer in first.gang.peers] == ["10.0.0.1", "10.0.0.2"]
    assert (first.gang.key, first.gang.first_port) == (second.gang.key, second.gang.first_port)
    assert len(first.gang.key) > 40


async def test_no_rank_starts_before_there_is_room_for_all(two_nodes: Bench) -> None:
    full = start(node_id="node2", template=JobTemplate(command=("x",), resources=Resources(cpu_count=4)))
    await two_nodes.deliver(full)
    await two_nodes.work()
    asked = gang(NODE, "node2")
    await two_nodes.deliver(asked)
    await two_nodes.work()
    assert [(await two_nodes.row(rank_id(asked, rank))).state for rank in range(2)] == ["accepted"] * 2
    assert list(two_nodes.cluster.held) == [full.attempt_id]
    assert len(two_nodes.cluster.orders) == 1


async def test_a_gang_with_a_node_that_is_not_there_never_starts(two_nodes: Bench) -> None:
    asked = gang(NODE, "node2")
    await two_nodes.deliver(asked)
    two_nodes.cluster.alive.remove("node2")
    await two_nodes.watcher.look()
    await two_nodes.work()
    row = await two_nodes.row(rank_id(asked, 0))
    assert (row.state, row.reason) == ("ended", "lost")
    await two_nodes.deliver(StopExecution(attempt_id=asked.attempt_id, reason="rank 0: lost"))
    await two_nodes.work()
    other = await two_nodes.row(rank_id(asked, 1))
    assert (other.state, other.reason, other.detail) == ("ended", "stopped", "rank 0: lost")
    assert (two_nodes.cluster.held, two_nodes.cluster.orders) == ({}, [])


async def test_a_stop_reaches_every_rank_that_has_not_ended(two_nodes: Bench) -> None:
    asked = gang(NODE, "node2", NODE)
    template = TORCH.model_copy(update={"gang": Gang(type="torch", roles=(Role(name="worker", count=3),))})
    asked = asked.model_copy(update={"template": template})
    await two_nodes.deliver(asked)
    await two_nodes.work()
    await two_nodes.deliver(report(asked, 1, "ended", reason="exited", exit_code=3))
    await two_nodes.deliver(StopExecution(attempt_id=asked.attempt_id, reason="rank 1: exit code 3"))
    await two_nodes.work()
    stopped = sorted(two_nodes.cluster.stops)
    assert {each for each, _ in stopped} == {rank_id(asked, 0), rank_id(asked, 2)}
    assert {reason for _, reason in stopped} == {"rank 1: exit code 3"}


async def test_what_a_gang_holds_is_given_back_when_all_ranks_have_ended(two_nodes: Bench) -> None:
    asked = gang(NODE, "node2")
    await two_nodes.deliver(asked)
    await two_nodes.work()
    for rank in range(2):
        assert list(two_nodes.cluster.held) == [asked.attempt_id]
        await two_nodes.sweeper.sweep()
        two_nodes.cluster.report(asked.seats[rank].node_id, rank_id(asked, rank), state="ended", reason="exited")
        await two_nodes.deliver(report(asked, rank, "ended", reason="exited", exit_code=0))
        await two_nodes.work()
    assert two_nodes.cluster.held == {}
    assert await two_nodes.names() == ["execution.ended"] * 2
    told = [event.execution.rank for name, event in await two_nodes.emitted() if name == "execution.ended"]  # type: ignore[attr-defined]
    assert told == [0, 1]
    await two_nodes.deliver(LogSealed(job_id=asked.job_id))
    await two_nodes.work()
    assert two_nodes.cluster.attempts == {}


async def test_a_new_head_learns_what_a_running_gang_holds(two_nodes: Bench) -> None:
    asked = gang(NODE, "node2")
    await two_nodes.deliver(asked)
    await two_nodes.work()
    two_nodes.cluster.held.clear()
    await two_nodes.sweeper.sweep()
    assert [part.node_id for part in two_nodes.cluster.held[asked.attempt_id].parts] == [NODE, "node2"]


async def test_only_the_rank_on_a_lost_node_is_lost(two_nodes: Bench) -> None:
    asked = gang(NODE, "node2")
    await two_nodes.deliver(asked)
    await two_nodes.work()
    await two_nodes.watcher.look()
    two_nodes.cluster.alive.remove("node2")
    two_nodes.now_s += 100
    await two_nodes.watcher.look()
    assert (await two_nodes.row(rank_id(asked, 1))).reason == "lost"
    assert (await two_nodes.row(rank_id(asked, 0))).state == "running"


async def test_what_an_agent_knows_better_is_learned_of_each_rank(two_nodes: Bench) -> None:
    asked = gang(NODE, "node2")
    await two_nodes.deliver(asked)
    await two_nodes.work()
    two_nodes.cluster.report("node2", rank_id(asked, 1), state="ended", reason="exited", exit_code=5)
    await two_nodes.watcher.look()
    assert (await two_nodes.row(rank_id(asked, 1))).exit_code == 5
    assert (await two_nodes.row(rank_id(asked, 0))).state == "running"


async def test_the_scheduler_is_told_of_all_ranks_and_each_has_a_token(two_nodes: Bench) -> None:
    asked = gang(NODE, "node2")
    await two_nodes.deliver(asked)
    await two_nodes.work()
    caller = Principal(kind="service", id="scheduler", team_id=TEAM)
    call = two_nodes.envelope(ListExecutions(), caller)
    async with two_nodes.store.begin() as unit:
        page = await handlers.list_executions(ListExecutions(attempt_ids=(asked.attempt_id,)), unit, call)
        assert [(each.attempt_id, each.rank) for each in page.items] == [(asked.attempt_id, 0), (asked.attempt_id, 1)]
        for order in two_nodes.cluster.orders:
            question = AuthenticateAttempt(token_hash=secret_hash(order.token))
            assert (await handlers.authenticate_attempt(question, unit, call)).rank == order.rank


async def test_gangs_on_the_same_node_have_ports_of_their_own(two_nodes: Bench) -> None:
    small = TORCH.model_copy(update={"resources": Resources(cpu_count=0.5)})
    gangs = [
        gang(NODE, "node2", template=small),
        gang(NODE, NODE, template=small),
        gang("node2", "node2", template=small),
    ]
    for asked in gangs:
        await two_nodes.deliver(asked)
        await two_nodes.work()
    first, second, third = [(await two_nodes.row(rank_id(asked, 1))).gang["first_port"] for asked in gangs]
    assert first == FIRST_PORT
    assert second == third == FIRST_PORT + PORT_COUNT


def test_a_node_without_ports_left_has_no_block() -> None:
    all_taken = [FIRST_PORT + number * PORT_COUNT for number in range(BLOCKS)]
    assert free_block(all_taken) == 0
    assert free_block(all_taken[1:]) == FIRST_PORT
    assert max(all_taken) + PORT_COUNT <= 32_768


def test_ranks_know_where_they_lie() -> None:
    roles = (Role(name="master", count=1), Role(name="worker", count=2), Role(name="ps", count=1))
    template = JobTemplate(command=("x",), gang=Gang(type="grpc", roles=roles))
    facts = GangFacts(("b", "a", "b", "a"), FIRST_PORT, "key")
    order = gang_order("grpc", facts, ranks_of(template), 2, {"a": "10.0.0.1", "b": "10.0.0.2"})
    assert [(p.rank, p.role, p.index, p.node_rank, p.local_rank, p.address) for p in order.peers] == [
        (0, "master", 0, 0, 0, "10.0.0.2"),
        (1, "worker", 0, 1, 0, "10.0.0.1"),
        (2, "worker", 1, 0, 1, "10.0.0.2"),
        (3, "ps", 0, 1, 1, "10.0.0.1"),
    ]
    assert order.me.rank == 2
    assert (meeting_port(order), port_of(order, 3)) == (FIRST_PORT, FIRST_PORT + 4)
    assert missing_addresses(facts, {"a": "10.0.0.1", "b": ""}) == ["b"]


def test_a_gang_on_one_node_meets_on_loopback_and_needs_no_address() -> None:
    facts = GangFacts(("a", "a"), FIRST_PORT, "key")
    assert missing_addresses(facts, {}) == []
    order = gang_order("torch", facts, ranks_of(TORCH), 0, {})
    assert {peer.address for peer in order.peers} == {"127.0.0.1"}
