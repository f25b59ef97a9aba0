"""Every state against every trigger, and every turn of the inventory."""

from __future__ import annotations

from itertools import product

import pytest

from libs.common.clock import utc_now
from libs.common.contracts.messages import Execution, Resources
from libs.common.errors import IllegalTransition
from services.executor.domain.execution import STATES, TABLE, amounts_for, facts_of, short_reason
from services.executor.domain.inventory import (
    GONE,
    READY,
    SILENT,
    KnownNode,
    changed,
    inventory_unasked,
    next_inventory,
)

pytestmark = pytest.mark.unit

TRIGGERS = ("reserve", "tell", "run", "finish", "end")
LAWFUL = {
    ("accepted", "reserve"): "reserved",
    ("accepted", "end"): "ended",
    ("reserved", "reserve"): "reserved",
    ("reserved", "tell"): "starting",
    ("reserved", "run"): "running",
    ("reserved", "finish"): "finishing",
    ("reserved", "end"): "ended",
    ("starting", "tell"): "starting",
    ("starting", "run"): "running",
    ("starting", "finish"): "finishing",
    ("starting", "end"): "ended",
    ("running", "tell"): "running",
    ("running", "run"): "running",
    ("running", "finish"): "finishing",
    ("running", "end"): "ended",
    ("finishing", "tell"): "finishing",
    ("finishing", "run"): "finishing",
    ("finishing", "finish"): "finishing",
    ("finishing", "end"): "ended",
}


@pytest.mark.parametrize(("state", "trigger"), list(product(STATES, TRIGGERS)))
def test_every_state_answers_every_trigger(state: str, trigger: str) -> None:
    if state == "ended":
        assert TABLE.next_state("at1", state, trigger) == "ended"
    elif (state, trigger) in LAWFUL:
        assert TABLE.next_state("at1", state, trigger) == LAWFUL[state, trigger]
    else:
        with pytest.raises(IllegalTransition, match=f"is {state}"):
            TABLE.next_state("at1", state, trigger)


def test_a_report_says_only_what_it_knows() -> None:
    now = utc_now()
    running = facts_of(Execution(state="running", node_id="n", isolation="bwrap", started_at=now))
    assert set(running) == {"node_id", "isolation", "started_us"} | ({"exit_code"} & set(running))
    ended = facts_of(Execution(state="ended", node_id="n", reason="exited", exit_code=0, ended_at=now))
    assert (ended["reason"], ended["exit_code"]) == ("exited", 0)


def test_an_unknown_reason_is_a_lost_run() -> None:
    assert facts_of(Execution(state="ended", reason="surprise"))["reason"] == "lost"


def test_no_wish_for_cpus_is_one_cpu() -> None:
    assert amounts_for(Resources()) == {"CPU": 1.0}
    wished = amounts_for(Resources(cpu_count=2.5, memory_bytes=10, gpu_count=1))
    assert wished == {"CPU": 2.5, "memory": 10.0, "GPU": 1.0}


def test_a_reason_is_one_short_line() -> None:
    assert short_reason("  a\n b\t c ") == "a b c"
    assert len(short_reason("x" * 1000)) == 500


def node(state: str = READY, heard_s: float = 0.0) -> KnownNode:
    return KnownNode("n1", "host", state, 4.0, 8, 0.0, heard_s=heard_s)


def test_a_node_out_of_contact_is_silent_first_and_gone_only_after_fence_and_margin() -> None:
    def later(now_s: float) -> str:
        return next_inventory([node()], {}, now_s, fence_s=120.0)[0].state

    assert later(0.1) == SILENT
    assert later(149.9) == SILENT
    assert later(150.0) == GONE


def test_a_node_that_is_seen_again_is_what_was_seen() -> None:
    (after,) = next_inventory([node(SILENT)], {"n1": node(READY, 140.0)}, 140.0, 120.0)
    assert (after.state, after.heard_s) == (READY, 140.0)


def test_a_gone_node_stays_gone_until_it_is_seen() -> None:
    assert next_inventory([node(GONE, heard_s=100.0)], {}, 100.0, 120.0)[0].state == GONE


def test_a_node_that_the_silent_head_heard_last_may_still_be_in_contact_with_it() -> None:
    (after,) = inventory_unasked([node(heard_s=5.0)], 5.0, 1000.0, fence_s=120.0)
    assert (after.state, after.heard_s) == (SILENT, 1000.0)


def test_a_node_that_the_head_had_lost_before_it_fell_silent_goes_on_to_be_gone() -> None:
    (after,) = inventory_unasked([node(SILENT, heard_s=5.0)], 6.0, 155.0, fence_s=120.0)
    assert (after.state, after.heard_s) == (GONE, 5.0)


def test_hearing_of_a_node_again_is_no_change() -> None:
    assert not changed([node(heard_s=1.0)], [node(heard_s=2.0)])
    assert changed([node()], [node(SILENT)])
    assert changed([], [node()])
