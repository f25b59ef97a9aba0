from __future__ import annotations

import random
from dataclasses import replace

import pytest

from services.scheduler.domain.cluster import Machine
from services.scheduler.domain.policy import Demand, Placement, Policy
from services.scheduler.domain.shapes import Shape, shape_of

pytestmark = pytest.mark.unit

GIB = 1 << 30
ONE_CPU = shape_of(1, 0, 0)


def job(name: str, order: int = 0, team: str = "a", shape: Shape = ONE_CPU, ranks: int = 1, **fields) -> Demand:
    return Demand(name, team, (shape,) * ranks, order, **fields)


def machines(nodes: dict[str, Shape]) -> dict[str, Machine]:
    return {node: Machine(total) for node, total in nodes.items()}


def policy_with(*demands: Demand, **nodes: Shape) -> Policy:
    policy = Policy()
    policy.apply_nodes(machines(nodes), "")
    for demand in demands:
        policy.apply(demand)
    return policy


def test_jobs_of_a_team_go_in_the_order_of_their_creation():
    policy = policy_with(*(job(f"j{n}", order=n) for n in (3, 1, 2)), n1=shape_of(2, 0, 0))
    assert [placement.job_id for placement in policy.decide(0)] == ["j1", "j2"]


def test_a_job_goes_to_the_node_that_is_left_with_the_least():
    big_gpu, small, large = shape_of(4, 8 * GIB, 2), shape_of(2, 4 * GIB, 0), shape_of(8, 64 * GIB, 0)
    policy = policy_with(job("j"), gpu=big_gpu, large=large, small=small)
    assert policy.decide(0) == [Placement("j", ("small",))]


def test_each_resource_is_enough_or_the_node_is_not_taken():
    needs = shape_of(1, 4 * GIB, 1)
    policy = policy_with(job("j", shape=needs), a=shape_of(8, 2 * GIB, 8), b=shape_of(8, 64 * GIB, 0))
    assert policy.decide(0) == []
    assert policy.why_waiting("j") == "needs 1 GPU, 1 CPU, 4 GiB on one node, and no node has all of it"


def test_teams_take_turns_by_what_they_hold():
    many = [job(f"a{n}", order=n) for n in range(4)]
    few = [job(f"b{n}", order=100 + n, team="b") for n in range(2)]
    placements = policy_with(*many, *few, n1=shape_of(4, 0, 0)).decide(0)
    assert [placement.job_id for placement in placements] == ["a0", "b0", "a1", "b1"]


def test_a_job_that_fits_nowhere_lets_others_pass():
    policy = policy_with(job("big", 1, shape=shape_of(9, 0, 0)), job("small", 2), n1=shape_of(4, 0, 0))
    assert policy.decide(0) == [Placement("small", ("n1",))]
    assert policy.newly_blocked() == {"big": "needs 9 CPUs, the largest node has 4 CPUs"}
    assert policy.newly_blocked() == {}


def test_freed_room_is_given_to_who_waits():
    policy = policy_with(job("j1", 1), job("j2", 2), n1=ONE_CPU)
    assert policy.decide(0) == [Placement("j1", ("n1",))]
    assert policy.why_waiting("j2") == "waits for 1 CPU to become free on one node"
    policy.forget("j1")
    assert policy.decide(0) == [Placement("j2", ("n1",))]


def test_without_nodes_the_reason_says_why():
    policy = Policy()
    policy.apply_nodes({}, "the Ray cluster is still starting")
    policy.apply(job("j"))
    assert policy.decide(0) == []
    assert policy.newly_blocked() == {"j": "no node is ready: the Ray cluster is still starting"}
    policy.apply_nodes(machines({"n1": ONE_CPU}), "")
    assert policy.decide(0) == [Placement("j", ("n1",))]


def test_what_is_held_on_a_node_counts_when_the_node_comes_back():
    policy = policy_with(job("held", node_ids=("n1",)), job("j"), n1=ONE_CPU)
    policy.apply_nodes({}, "")
    policy.apply_nodes(machines({"n1": ONE_CPU}), "")
    assert policy.decide(0) == []
    policy.apply_nodes(machines({"n1": shape_of(2, 0, 0)}), "")
    assert policy.decide(0) == [Placement("j", ("n1",))]


def test_a_postponed_job_is_placed_when_its_time_has_come():
    policy = policy_with(job("j", ready_us=50), n1=ONE_CPU)
    assert policy.decide(49) == []
    assert (policy.next_ready_us, policy.waiting) == (50, 1)
    assert policy.decide(50) == [Placement("j", ("n1",))]
    assert policy.next_ready_us is None


def test_a_job_that_left_the_queue_is_not_placed():
    policy = policy_with(job("j1", 1), job("j2", 2), job("j3", 3, ready_us=5), n1=shape_of(9, 0, 0))
    for gone in ("j1", "j3", "unknown"):
        policy.forget(gone)
    assert policy.decide(9) == [Placement("j2", ("n1",))]
    assert policy.waiting == 0


def test_a_placement_that_was_not_kept_is_made_again():
    policy = policy_with(job("j"), n1=ONE_CPU)
    policy.decide(0)
    policy.apply(job("j"))
    assert policy.decide(0) == [Placement("j", ("n1",))]


def test_fractions_of_cpus_add_up_exactly():
    policy = policy_with(*(job(f"j{n}", n, shape=shape_of(0.1, 0, 0)) for n in range(11)), n1=ONE_CPU)
    assert len(policy.decide(0)) == 10


def test_the_limit_leaves_the_rest_for_the_next_decision():
    policy = policy_with(*(job(f"j{n}", n) for n in range(5)), n1=shape_of(5, 0, 0))
    assert [len(policy.decide(0, limit=2)) for _ in range(4)] == [2, 2, 1, 0]


def test_a_job_that_the_next_decision_may_place_is_not_told_that_it_waits():
    policy = policy_with(*(job(f"j{n}", n) for n in range(5)), n1=shape_of(4, 0, 0))
    assert len(policy.decide(0, limit=2)) == 2
    assert policy.newly_blocked() == {}
    assert policy.has_unexplained
    assert len(policy.decide(0, limit=9)) == 2
    assert policy.newly_blocked() == {"j4": "waits for 1 CPU to become free on one node"}
    assert not policy.has_unexplained


def test_reasons_come_in_portions_and_reach_everybody():
    policy = policy_with(*(job(f"j{n}", n) for n in range(5)))
    assert policy.decide(0) == []
    portions = [sorted(policy.newly_blocked(limit=2)) for _ in range(4)]
    assert portions == [["j0", "j1"], ["j2", "j3"], ["j4"], []]


def test_a_hundred_thousand_waiting_jobs_cost_a_decision_nothing():
    policy = policy_with(n1=shape_of(4, 0, 0), n2=shape_of(4, 0, 0))
    shapes = [shape_of(cpus, 0, 0) for cpus in (1, 2, 4)]
    for n in range(100_000):
        policy.apply(job(f"j{n:06}", n, team=f"t{n % 10}", shape=shapes[n % 3]))
    placed = policy.decide(0)
    assert sum(shapes[int(item.job_id[1:]) % 3].milli_cpus for item in placed) == 8000
    policy.newly_blocked()

    before = policy.touched
    assert policy.decide(0) == []
    assert policy.touched == before, "nothing changed, nothing is looked at"

    policy.forget(placed[0].job_id)
    policy.apply(job("late", 200_000, team="t1"))
    assert len(policy.decide(0)) >= 1
    assert policy.touched - before < 200, "one end and one arrival cost a handful of looks"


def ids(placements: list[Placement]) -> list[str]:
    return [placement.job_id for placement in placements]


def test_priority_comes_before_age_and_before_what_a_team_holds():
    demands = [job("old", 1), job("urgent", 9, priority=90), job("low", 0, priority=10), job("b", 5, team="b")]
    policy = policy_with(job("held", team="b", node_ids=("n1",)), *demands, n1=shape_of(5, 0, 0))
    assert ids(policy.decide(0)) == ["urgent", "old", "b", "low"]


def test_among_equals_the_share_decides_also_when_it_grew_at_another_priority():
    high = [job(f"a{n}", n, priority=80) for n in range(2)]
    low = [job("a", 3), job("b", 4, team="b")]
    assert ids(policy_with(*high, *low, n1=shape_of(3, 0, 0)).decide(0)) == ["a0", "a1", "b"]


def test_a_gang_is_placed_as_a_whole_or_not_at_all():
    policy = policy_with(job("g", ranks=3), n1=shape_of(2, 0, 0))
    assert policy.decide(0) == []
    assert policy.why_waiting("g") == "needs 3 times (1 CPU), and all nodes together have not"
    policy.apply_nodes(machines({"n1": shape_of(2, 0, 0), "n2": ONE_CPU}), "")
    placements = policy.decide(0)
    assert [sorted(placement.node_ids) for placement in placements] == [["n1", "n1", "n2"]]
    policy.apply(job("next"))
    assert policy.decide(0) == []
    policy.forget("g")
    assert ids(policy.decide(0)) == ["next"]


def test_small_jobs_do_not_starve_a_gang():
    """Two small jobs run, each ends in its turn, and another small one is always there."""
    running = [job(f"r{n}", n, node_ids=(f"n{n}",)) for n in range(2)]
    policy = policy_with(*running, job("g", 10, ranks=2), n0=ONE_CPU, n1=ONE_CPU)
    policy.decide(0)
    for n in range(10):
        policy.apply(job(f"s{n}", 20 + n))
    policy.forget("r0")
    assert policy.decide(0) == []
    assert policy.why_waiting("s0") == "2 nodes are kept free for a job of several processes that came before"
    assert policy.why_waiting("g") == "waits for 2 times (1 CPU) to become free at once"
    policy.forget("r1")
    assert policy.decide(0) == [Placement("g", ("n0", "n1"))]
    policy.forget("g")
    assert ids(policy.decide(0)) == ["s0", "s1"]


def test_a_job_of_higher_priority_passes_the_gang_that_keeps_back():
    policy = policy_with(job("r", node_ids=("n0",)), job("g", 1, ranks=2), n0=ONE_CPU, n1=ONE_CPU)
    policy.decide(0)
    policy.apply(job("equal", 2))
    policy.apply(job("urgent", 3, priority=51))
    assert ids(policy.decide(0)) == ["urgent"]


def test_only_nodes_that_the_gang_needs_are_kept_back():
    policy = policy_with(
        job("r", node_ids=("n0",)), job("g", 1, ranks=2), n0=shape_of(1, 0, 0), n1=shape_of(1, 0, 0), n2=ONE_CPU
    )
    policy.apply(job("x", node_ids=("n2",)))
    policy.decide(0)
    assert policy.kept_back.node_ids == {"n1", "n2"}
    policy.forget("r")
    policy.apply(job("s", 2))
    assert ids(policy.decide(0)) == ["g"], "what became free is enough"


def test_a_gang_that_leaves_lets_go_and_the_next_one_keeps_back():
    policy = policy_with(job("r", node_ids=("n0",)), n0=ONE_CPU, n1=ONE_CPU)
    for demand in (job("g1", 1, ranks=2), job("g2", 2, team="b", ranks=2), job("s", 3)):
        policy.apply(demand)
    assert policy.decide(0) == []
    policy.forget("g1")
    assert policy.kept_back.place.job_id == "g2"
    assert policy.decide(0) == []
    policy.forget("g2")
    assert policy.kept_back is None
    assert ids(policy.decide(0)) == ["s"]


def test_nothing_is_kept_back_where_work_never_ends():
    policy = policy_with(
        job("replica", node_ids=("n0",), lasting=True), job("g", 1, ranks=2), job("s", 2), n0=ONE_CPU, n1=ONE_CPU
    )
    assert ids(policy.decide(0)) == ["s"]
    assert policy.kept_back is None


def test_a_node_that_is_closed_takes_nothing_and_keeps_what_it_has():
    policy = policy_with(job("held", node_ids=("n1",)), n1=shape_of(4, 0, 0))
    policy.apply_nodes({"n1": Machine(shape_of(4, 0, 0), closed="is being drained")}, "")
    policy.apply(job("j"))
    assert policy.decide(0) == []
    assert policy.why_waiting("j") == "no node is ready"
    policy.apply_nodes(machines({"n1": shape_of(4, 0, 0)}), "")
    policy.apply(job("big", 1, shape=shape_of(4, 0, 0)))
    assert ids(policy.decide(0)) == ["j"]


def test_a_gpu_that_no_node_has_is_hopeless_unless_one_may_come():
    wanted = job("j", shape=shape_of(1, 0, 1, "H200"))
    h100 = shape_of(8, 0, 8, "NVIDIA H100", 80 * GIB)
    policy = policy_with(wanted)
    policy.decide(0)
    assert policy.why_hopeless("j") == "", "nobody knows yet what there is"
    policy.apply_nodes(machines({"n1": h100}), "")
    policy.decide(0)
    reason = "needs 1 H200 GPU, 1 CPU, and no node has such a GPU; the GPUs here are NVIDIA H100"
    assert policy.why_hopeless("j") == reason
    away = {"n1": Machine(h100), "n2": Machine(shape_of(8, 0, 1, "NVIDIA H200"), closed="is silent")}
    policy.apply_nodes(away, "")
    assert policy.why_hopeless("j") == "", "it may come back"
    assert policy.why_waiting("j") == "needs 1 H200 GPU, and no node that takes work has such a GPU"
    hopeful = Policy(could_come=lambda parts: parts[0].gpu_model == "H200")
    hopeful.apply_nodes(machines({"n1": h100}), "")
    hopeful.apply(wanted)
    assert hopeful.decide(0) == []
    assert hopeful.why_hopeless("j") == ""
    assert hopeful.unmet() == {wanted.parts: 1}


def test_too_many_of_anything_else_waits():
    policy = policy_with(job("j", shape=shape_of(1, 0, 9)), n1=shape_of(8, 0, 8))
    policy.decide(0)
    assert (policy.why_hopeless("j"), policy.why_waiting("j")) == ("", "needs 9 GPUs, the largest node has 8 GPUs")


def test_a_job_is_given_up_once_when_it_has_waited_long_enough():
    policy = policy_with(job("j1", give_up_us=50), job("j2", 1, give_up_us=50), job("gone", give_up_us=10), n1=ONE_CPU)
    policy.forget("gone")
    assert ids(policy.decide(0)) == ["j1"]
    assert (policy.given_up(49), policy.given_up(50), policy.given_up(99)) == ([], ["j2"], [])


def test_a_held_job_waits_with_its_reason_and_goes_on():
    policy = policy_with(job("j", hold="its project is archived"), n1=ONE_CPU)
    assert policy.decide(0) == []
    assert policy.newly_blocked() == {"j": "its project is archived"}
    assert policy.waiting == 1
    policy.apply(job("j"))
    assert ids(policy.decide(0)) == ["j"]


def test_the_place_in_the_queue_counts_who_comes_before():
    demands = [job("low", 0, priority=1), job("j", 5), job("older", 4, team="b"), job("high", 9, priority=99)]
    policy = policy_with(*demands)
    assert [policy.before(name) for name in ("high", "older", "j", "low")] == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_gangs_in_a_random_life_are_never_split_and_never_starve(seed):
    dice = random.Random(seed)
    nodes = {f"n{n}": shape_of(dice.randint(1, 4), 0, dice.randint(0, 2)) for n in range(4)}
    policy = policy_with(**nodes)
    waiting, held = {}, {}
    for step in range(300):
        if dice.random() < 0.6:
            shape = shape_of(dice.choice((0.5, 1)), 0, dice.choice((0, 0, 0.5, 1)))
            new = job(
                f"j{step:03}", step, team=dice.choice("ab"), shape=shape, ranks=dice.choice((1, 1, 1, 2, 3)),
                priority=dice.choice((50, 50, 60)),
            )  # fmt: skip
            if could_hold(nodes, new):
                waiting[new.job_id] = new
                policy.apply(new)
        elif held:
            policy.forget(held.pop(dice.choice(sorted(held))).job_id)
        for placement in policy.decide(step):
            placed = waiting.pop(placement.job_id)
            assert len(placement.node_ids) == len(placed.parts)
            held[placed.job_id] = replace(placed, node_ids=placement.node_ids)
        assert all(min((*room.free.amounts, *room.gpus)) >= 0 for room in policy.cluster.open_rooms().values())
    for step in range(10_000):
        if not waiting:
            break
        gone = held.pop(min(held)) if held else None
        if gone:
            policy.forget(gone.job_id)
        for placement in policy.decide(step):
            held[placement.job_id] = waiting.pop(placement.job_id)
    assert not waiting


def could_hold(nodes: dict[str, Shape], demand: Demand) -> bool:
    return policy_with(**nodes).cluster.could_hold(demand.parts)


@pytest.mark.parametrize("seed", range(20))
def test_the_same_history_gives_the_same_decisions_and_never_more_than_there_is(seed):
    first, second = (replay(random.Random(seed)) for _ in range(2))
    assert first == second


def replay(dice: random.Random) -> list[Placement]:
    """A random life of a cluster; checks after each step that no node is overfull and nobody fits who waits."""
    nodes = {f"n{n}": shape_of(dice.randint(1, 8), dice.randint(1, 16) * GIB, dice.randint(0, 2)) for n in range(4)}
    policy = policy_with(**nodes)
    waiting: dict[str, Demand] = {}
    held: dict[str, Demand] = {}
    history: list[Placement] = []
    for step in range(150):
        match dice.randint(0, 3):
            case 0 | 1:
                shape = shape_of(dice.choice((0.5, 1, 2)), dice.randint(0, 4) * GIB, dice.choice((0, 0, 1)))
                new = job(f"j{step}", step, team=dice.choice("abc"), shape=shape)
                waiting[new.job_id] = new
                policy.apply(new)
            case 2 if held:
                gone = dice.choice(sorted(held))
                del held[gone]
                policy.forget(gone)
            case 3 if waiting:
                gone = dice.choice(sorted(waiting))
                del waiting[gone]
                policy.forget(gone)
        for placement in policy.decide(step):
            held[placement.job_id] = waiting.pop(placement.job_id)
            history.append(placement)
        free = dict(nodes)
        for placement in history:
            if placement.job_id in held:
                node = placement.node_ids[0]
                free[node] = free[node].minus(held[placement.job_id].parts[0])
        assert all(min(left[:3]) >= 0 for left in free.values())
        assert not any(left.holds(demand.parts[0]) for left in free.values() for demand in waiting.values())
        assert policy.waiting == len(waiting)
    return history


def islands(**nodes: Shape) -> dict[str, Machine]:
    return {node: Machine(total, is_island=True) for node, total in nodes.items()}


def test_a_gang_is_not_spread_over_nodes_whose_sandboxes_reach_no_other():
    policy = policy_with(job("g", ranks=2))
    policy.apply_nodes(islands(n1=ONE_CPU, n2=ONE_CPU), "")
    assert policy.decide(0) == []
    for why in (policy.why_hopeless("g"), policy.why_waiting("g")):
        assert why.startswith(
            "needs 2 times (1 CPU), which no node has alone; on several nodes its ranks could not reach"
        )
        assert "apt-get install passt" in why


def test_a_gang_is_placed_where_nodes_reach_each_other_or_on_one_that_does_not():
    policy = policy_with(job("g", ranks=2), job("h", 1, ranks=2))
    reaching = machines({"n2": ONE_CPU, "n3": ONE_CPU})
    policy.apply_nodes(islands(n1=ONE_CPU, n4=shape_of(2, 0, 0)) | reaching, "")
    placed = {placement.job_id: set(placement.node_ids) for placement in policy.decide(0)}
    assert placed == {"g": {"n2", "n3"}, "h": {"n4"}}


def test_a_gang_that_waits_for_a_node_whose_sandboxes_reach_others_has_hope():
    policy = policy_with(job("g", ranks=2))
    away = {node: Machine(ONE_CPU, closed="is silent") for node in ("n2", "n3")}
    policy.apply_nodes(islands(n1=ONE_CPU) | away, "")
    assert policy.decide(0) == []
    assert policy.why_hopeless("g") == ""


def test_islands_keep_single_jobs_as_any_node_does():
    policy = policy_with(job("a"), job("b", 1))
    policy.apply_nodes(islands(n1=ONE_CPU, n2=ONE_CPU), "")
    assert ids(policy.decide(0)) == ["a", "b"]


IN_IMAGE = ONE_CPU._replace(images=True)


def test_a_job_in_an_image_goes_where_images_run():
    policy = policy_with(job("j", shape=IN_IMAGE), n1=ONE_CPU, n2=shape_of(8, 0, 0)._replace(images=True))
    assert [placement.node_ids for placement in policy.decide(0)] == [("n2",)]
    policy.apply(job("plain", 1))
    assert [placement.node_ids for placement in policy.decide(0)] == [("n1",)]


def test_a_job_in_an_image_waits_for_a_node_that_has_podman():
    policy = policy_with(job("j", shape=IN_IMAGE), n1=shape_of(8, 0, 0))
    assert policy.decide(0) == []
    assert policy.why_waiting("j").startswith("runs in a container image, and no node has podman")
    assert policy.why_hopeless("j") == "", "somebody may install it"
    policy.apply_nodes(machines({"n1": shape_of(8, 0, 0)._replace(images=True)}), "")
    assert ids(policy.decide(0)) == ["j"]
