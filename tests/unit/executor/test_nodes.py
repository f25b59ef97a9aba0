"""Nodes that come, drain, rest and go; tickets for new ones; demand for more."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.clock import to_us, utc_now
from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    AdmitNode,
    CheckNodeToken,
    CreateNodeToken,
    Demand,
    DemandChanged,
    DrainNode,
    LogSealed,
    NodesReported,
    Resources,
    StopExecution,
)
from libs.common.errors import Conflict, NotFound, Unauthenticated
from libs.common.ids import secret_hash
from services.executor import handlers
from services.executor.adapters.cluster.ray_agent import node_own
from services.executor.adapters.cluster.ray_ticket import ticket
from services.executor.domain.demand import HOLDS_S, bundles_for
from services.executor.domain.inventory import GONE, RESTING, KnownNode, may_rest, next_inventory
from services.executor.loops import Driver, Scaler, Watcher
from services.executor.ports import AgentConfig, Ticket
from services.executor.store import DemandRow
from tests.unit.executor.bench import SERVICE, TEAM, Bench, start
from tests.unit.executor.fake_cluster import NODE

pytestmark = pytest.mark.unit
OTHER = "node2"


async def nodes_of(bench: Bench) -> dict[str, str]:
    """Node -> state, as it was last told to others."""
    told = [message for _, message in await bench.emitted() if isinstance(message, NodesReported)]
    return {node.id: node.state + (" draining" if node.draining else "") for node in told[-1].nodes}


async def drain(bench: Bench, node_id: str = NODE, undo: bool = False) -> None:
    call = Envelope(id="e1", type="node.drain.v1", source="test", time=utc_now(), team_id=TEAM, sender=SERVICE)
    await bench.store.run(lambda unit: handlers.drain_node(DrainNode(node_id=node_id, undo=undo), unit, call))


async def test_a_draining_node_finishes_its_work_and_then_rests(bench: Bench) -> None:
    bench.cluster.alive.add(OTHER)
    await bench.watcher.look()
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    await drain(bench)
    await bench.watcher.look()
    assert await nodes_of(bench) == {NODE: "ready draining", OTHER: "ready"}
    bench.cluster.report(NODE, asked.attempt_id, state="ended", reason="exited", exit_code=0)
    await bench.watcher.look()
    await bench.deliver(LogSealed(job_id=asked.job_id))
    await bench.work()
    for _ in range(3):
        bench.now_s += 2
        await bench.watcher.look()
    assert await nodes_of(bench) == {NODE: "resting draining", OTHER: "ready"}
    assert bench.cluster.resting == {NODE}
    await drain(bench, undo=True)
    await bench.watcher.look()
    assert await nodes_of(bench) == {NODE: "ready", OTHER: "ready"}


async def test_a_draining_node_keeps_its_agent_while_a_log_of_it_is_not_stored(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    bench.cluster.report(NODE, asked.attempt_id, state="ended", reason="exited", exit_code=0)
    await drain(bench)
    for _ in range(4):
        bench.now_s += 2
        await bench.watcher.look()
        await bench.work()
    assert await nodes_of(bench) == {NODE: "ready draining"}


async def test_what_a_node_keeps_for_a_while_goes_when_it_is_drained(bench: Bench) -> None:
    settings = bench.settings.model_copy(update={"keep_folder_s": 3600.0})
    bench.driver = Driver(bench.store, bench.cluster, settings)
    asked = start()
    await bench.deliver(asked)
    await bench.work()
    bench.cluster.report(NODE, asked.attempt_id, state="ended", reason="exited", exit_code=0)
    await bench.watcher.look()
    await bench.deliver(LogSealed(job_id=asked.job_id))
    await bench.work()
    assert (NODE, asked.attempt_id) in bench.cluster.attempts
    await drain(bench)
    await bench.work()
    assert (NODE, asked.attempt_id) not in bench.cluster.attempts


async def test_a_drained_node_that_leaves_is_gone_at_once_and_its_drain_forgotten(bench: Bench) -> None:
    bench.cluster.alive.add(OTHER)
    await bench.watcher.look()
    await drain(bench, OTHER)
    for _ in range(3):
        bench.now_s += 2
        await bench.watcher.look()
    assert (await nodes_of(bench))[OTHER] == "resting draining"
    bench.cluster.alive.discard(OTHER)
    await bench.watcher.look()
    assert (await nodes_of(bench))[OTHER] == "gone draining"
    async with bench.store.view() as view:
        assert await view.draining() == frozenset()


async def test_a_resting_node_does_not_go_because_the_head_is_silent(bench: Bench) -> None:
    await drain(bench)
    for _ in range(3):
        bench.now_s += 2
        await bench.watcher.look()
    bench.cluster.away = "the head is away"
    bench.now_s += 2
    await bench.watcher.look()
    assert await nodes_of(bench) == {NODE: "resting draining"}


async def test_a_node_that_is_not_there_cannot_be_drained(bench: Bench) -> None:
    with pytest.raises(NotFound):
        await drain(bench, "nobody")


async def test_an_order_that_was_on_its_way_to_a_resting_node_wakes_it(bench: Bench) -> None:
    await drain(bench)
    for _ in range(3):
        bench.now_s += 2
        await bench.watcher.look()
    await bench.deliver(start())
    await bench.watcher.look()
    assert bench.cluster.resting == frozenset()


class TestAutoscaling:
    @pytest.fixture
    def scaled(self, bench: Bench) -> Bench:
        settings = bench.settings.model_copy(update={"autoscale_limit": 3, "autoscale_idle_s": 60.0})
        made = replace(bench, settings=settings)
        made.driver = Driver(made.store, made.cluster, settings)
        made.watcher = Watcher(made.store, made.cluster, settings, made.driver.wake, lambda: made.now_s)
        return made

    async def test_demand_is_asked_for_bounded_and_withdrawn(self, scaled: Bench) -> None:
        scaler = Scaler(scaled.store, scaled.cluster, scaled.settings)
        present = {"CPU": 4.0, "memory": 8e9, "GPU": 2.0}
        await scaled.deliver(DemandChanged(demands=(Demand(resources=Resources(cpu_count=64), count=5),)))
        await scaler.look()
        await scaler.look()
        await scaled.deliver(DemandChanged())
        await scaler.look()
        assert scaled.cluster.asked_for == [[present, *[{"CPU": 64.0}] * 3], []]

    async def test_demand_that_nobody_repeats_is_withdrawn(self, scaled: Bench) -> None:
        scaler = Scaler(scaled.store, scaled.cluster, scaled.settings)
        await scaled.deliver(DemandChanged(demands=(Demand(resources=Resources(cpu_count=64), count=1),)))
        await scaler.look()

        async def age(unit) -> None:  # type: ignore[no-untyped-def]
            row = await unit.session.get(DemandRow, 1)
            row.told_us -= int((HOLDS_S + 1) * 1_000_000)
            unit.session.add(row)

        await scaled.store.run(age)
        await scaler.look()
        assert scaled.cluster.asked_for[-1] == []

    async def test_without_an_autoscaler_nothing_is_asked(self, bench: Bench) -> None:
        scaler = Scaler(bench.store, bench.cluster, bench.settings)
        await bench.deliver(DemandChanged(demands=(Demand(resources=Resources(cpu_count=64), count=1),)))
        await scaler.look()
        assert bench.cluster.asked_for == []

    async def test_an_idle_node_rests_and_demand_wakes_it(self, scaled: Bench) -> None:
        await scaled.watcher.look()
        scaled.now_s += 59
        await scaled.watcher.look()
        assert scaled.cluster.resting == frozenset()
        scaled.now_s += 2
        await scaled.watcher.look()
        assert scaled.cluster.resting == {NODE}
        await scaled.deliver(DemandChanged(demands=(Demand(resources=Resources(cpu_count=1), count=1),)))
        await scaled.watcher.look()
        assert scaled.cluster.resting == frozenset()
        await scaled.deliver(DemandChanged())
        await scaled.watcher.look()
        assert scaled.cluster.resting == {NODE}


def node(**facts: object) -> KnownNode:
    return replace(KnownNode(NODE, "host", "ready", 4.0, 1, 0.0), **facts)  # type: ignore[arg-type]


def test_the_heads_own_node_never_rests_by_itself() -> None:
    idle = node(is_head=True, busy_s=0.0)
    assert not may_rest(idle, is_busy=False, now_s=1e6, idle_s=60.0)
    assert may_rest(replace(idle, draining=True), is_busy=False, now_s=1e6, idle_s=None)


def test_only_a_resting_node_is_gone_the_moment_it_is_not_listed() -> None:
    after = next_inventory([node(heard_s=10.0), node(id=OTHER, state=RESTING)], {}, 11.0, 10.0)
    assert {each.id: each.state for each in after} == {NODE: "silent", OTHER: GONE}


_shapes = st.builds(
    Demand,
    resources=st.builds(Resources, cpu_count=st.integers(0, 8), gpu_count=st.integers(0, 2)),
    count=st.integers(0, 30),
)


@given(demands=st.lists(_shapes, max_size=6), limit=st.integers(1, 40))
def test_never_more_is_asked_than_waits_or_than_the_limit(demands: list[Demand], limit: int) -> None:
    asked = bundles_for(demands, [], limit)
    waiting = sum(demand.count for demand in demands)
    assert len(asked.bundles) == min(limit, waiting)
    assert asked.left_out == max(0, waiting - limit)
    assert asked == bundles_for(reversed(demands), [], limit)


def test_one_large_job_is_not_hidden_by_many_small_ones() -> None:
    small = Demand(resources=Resources(cpu_count=1), count=1000)
    large = Demand(resources=Resources(cpu_count=8, gpu_count=8, gpu_model="H100"), count=1)
    asked = bundles_for([small, large], [], 4)
    assert asked.bundles[0] == {"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 0.001}
    assert asked.left_out == 997


class TestTickets:
    OPEN = Ticket("10.0.0.1:6379", "secret", "3.11", "2.60")

    def call(self, bench: Bench, given: Ticket) -> Envelope:
        return Envelope(
            id="e1", type="node.invite.v1", source="test", time=utc_now(), team_id=TEAM, sender=SERVICE, facts=given
        )

    async def test_a_ticket_admits_one_machine_once(self, bench: Bench) -> None:
        call = self.call(bench, self.OPEN)
        made = await bench.store.run(lambda unit: handlers.invite_node(CreateNodeToken(token_hash="h"), unit, call))
        assert (made.python_version, made.ray_version) == ("3.11", "2.60")
        for _ in range(2):
            await bench.store.run(lambda unit: handlers.authenticate_node(CheckNodeToken(token_hash="h"), unit, call))
        admit = AdmitNode(token_hash="h", hostname="gpu1")
        grant = await bench.store.run(lambda unit: handlers.admit_node(admit, unit, call))
        assert (grant.ray_address, grant.ray_token) == ("10.0.0.1:6379", "secret")
        with pytest.raises(Unauthenticated, match="used already"):
            await bench.store.run(lambda unit: handlers.admit_node(admit, unit, call))

    async def test_an_old_or_unknown_ticket_admits_nobody(self, bench: Bench) -> None:
        call = self.call(bench, self.OPEN)
        await bench.store.run(lambda unit: unit.keep_node_token("old", to_us(unit.now - timedelta(seconds=1))))
        for token_hash in ("old", "never"):
            admit = AdmitNode(token_hash=token_hash)
            with pytest.raises(Unauthenticated):
                await bench.store.run(partial(handlers.admit_node, admit, call=call))

    async def test_nobody_is_invited_to_a_head_on_loopback(self, bench: Bench) -> None:
        call = self.call(bench, replace(self.OPEN, address="127.0.0.1:6379"))
        with pytest.raises(Conflict, match="no other machine reaches"):
            await bench.store.run(lambda unit: handlers.invite_node(CreateNodeToken(token_hash="h"), unit, call))

    def test_the_token_is_found_where_ray_finds_it(self, tmp_path: Path) -> None:
        file = tmp_path / "token"
        file.write_text("from file\n")
        in_file = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
        found = [ticket(str, env).token for env in (in_file, in_file | {"RAY_AUTH_TOKEN": "given"}, {})]
        assert found == ["from file", "given", ""]


async def test_an_attempt_that_a_restored_database_forgot_is_taken_up_and_can_be_stopped(bench: Bench) -> None:
    asked = start()
    await bench.deliver(asked)
    await bench.work()

    async def forget(unit) -> None:  # type: ignore[no-untyped-def]
        row = await unit.execution(asked.attempt_id)
        await unit.forget_tokens([row.id])
        await unit.session.delete(row)

    await bench.store.run(forget)
    await bench.watcher.look()
    await bench.watcher.look()
    row = await bench.row(asked.attempt_id)
    assert (row.state, row.job_id, row.node_id) == ("running", asked.job_id, NODE)
    async with bench.store.view() as view:
        assert await view.execution_of_token(secret_hash(bench.cluster.orders[0].token))
    await bench.deliver(StopExecution(attempt_id=asked.attempt_id, reason="cancelled"))
    await bench.work()
    await bench.watcher.look()
    assert (await bench.row(asked.attempt_id)).reason == "stopped"


async def test_two_nodes_of_one_machine_have_folders_of_their_own() -> None:
    config = AgentConfig("/shared", "/env", "/client", "/storage", "http://127.0.0.1:1", "nats://127.0.0.1:2", "")
    own = node_own(config, {"NABLA_NODE_DIR": "/mine", "NABLA_NODE_STORAGE": "", "HOME": "/root"}, "n1")
    assert node_own(config, {"NABLA_NODE_DIR": "/nodes/{node_id}"}, "n1").node_dir == "/nodes/n1"
    assert (own.node_dir, own.storage_root, own.default_environment) == ("/mine", "/storage", "/env")


def test_another_machine_is_told_the_outer_addresses() -> None:
    config = AgentConfig("", "", "", "", "http://127.0.0.1:1", "nats://127.0.0.1:2", "")
    config = replace(config, outer_front_door="http://10.0.0.1:1")
    here, there = config.seen_from(elsewhere=False), config.seen_from(elsewhere=True)
    assert (here.front_door, there.front_door) == ("http://127.0.0.1:1", "http://10.0.0.1:1")
    assert here.nats_url == there.nats_url == "nats://127.0.0.1:2"
    assert there == config.seen_from(elsewhere=True)
