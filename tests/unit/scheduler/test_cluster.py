"""Rooms and packing: GPUs one by one, and gangs on few nodes."""

from __future__ import annotations

import itertools

import pytest

from services.scheduler.domain.cluster import Cluster, Machine, empty_room, pack
from services.scheduler.domain.shapes import is_model, shape_of

pytestmark = pytest.mark.unit

GIB = 1 << 30
TWO_GPUS = shape_of(8, 0, 2, "NVIDIA H100 80GB HBM3", 80 * GIB)


def cluster_with(**machines) -> Cluster:
    cluster = Cluster()
    cluster.apply({node: Machine(total) for node, total in machines.items()})
    return cluster


def test_shares_of_gpus_are_counted_on_the_gpu_they_are_on():
    cluster = cluster_with(n1=TWO_GPUS)
    share = (shape_of(0.1, 0, 0.6),)
    for name in ("a", "b"):
        cluster.take(name, share, cluster.seats(share))
    assert cluster.seats((shape_of(0.1, 0, 0.5),)) == (), "0.8 are free, in two pieces of 0.4"
    assert cluster.seats((shape_of(0.1, 0, 0.4),)) == ("n1",)
    assert cluster.seats((shape_of(0.1, 0, 1),)) == ()


def test_a_share_goes_to_a_gpu_that_is_shared_already_so_that_whole_ones_stay_whole():
    cluster = cluster_with(n1=TWO_GPUS, n2=shape_of(8, 0, 1))
    quarter = (shape_of(0.1, 0, 0.25),)
    cluster.take("a", quarter, ("n1",))
    for name in "bcd":
        assert cluster.seats(quarter) == ("n1",)
        cluster.take(name, quarter, ("n1",))
    assert cluster.open_rooms()["n1"].gpus == (0, 1000)
    cluster.take("e", (shape_of(1, 0, 1),), ("n1",))
    assert cluster.seats((shape_of(1, 0, 1),)) == ("n2",)
    cluster.give_back("e", ("n1",))
    for name in "abcd":
        cluster.give_back(name, ("n1",))
    assert cluster.seats((shape_of(1, 0, 2),)) == ("n1",)


def test_the_gpu_that_the_executor_names_counts_and_not_the_one_that_was_guessed():
    cluster = cluster_with(n1=TWO_GPUS)
    half = (shape_of(0.1, 0, 0.5),)
    cluster.take("a", half, ("n1",), ((1,),))
    cluster.take("b", half, ("n1",), ((0,),))
    assert cluster.seats((shape_of(1, 0, 1),)) == ()
    assert cluster.open_rooms()["n1"].gpus == (500, 500)


def test_what_is_held_is_counted_again_when_a_machine_returns_changed():
    cluster = cluster_with(n1=TWO_GPUS)
    cluster.take("guessed", (shape_of(1, 0, 0.5),), ("n1",))
    cluster.take("known", (shape_of(1, 0, 1),), ("n1",), ((0,),))
    cluster.apply({})
    assert cluster.seats((shape_of(1, 0, 0),)) == ()
    cluster.apply({"n1": Machine(TWO_GPUS)})
    assert cluster.open_rooms()["n1"].gpus == (0, 500)
    cluster.give_back("known", ("n1",))
    cluster.give_back("guessed", ("n1",))
    assert cluster.open_rooms()["n1"] == empty_room(TWO_GPUS)


@pytest.mark.parametrize(
    ("wanted", "name", "same"),
    [
        ("h100", "NVIDIA H100 80GB HBM3", True),
        ("H100", "H100", True),
        ("nvidia h100", "NVIDIA-H100-PCIe", True),
        ("H10", "NVIDIA H100 80GB HBM3", False),
        ("A100", "NVIDIA H100", False),
        ("A100-40G", "A100-40G", True),
        ("H100", "", False),
    ],
)
def test_a_model_is_named_by_whole_words(wanted, name, same):
    assert is_model(wanted, name) is same


def test_only_gpus_of_the_wanted_kind_are_taken():
    cluster = cluster_with(h=TWO_GPUS, a=shape_of(8, 0, 8, "NVIDIA A100-SXM4-40GB", 40 * GIB), c=shape_of(8, 0, 0))
    assert cluster.seats((shape_of(1, 0, 1, "h100"),)) == ("h",)
    assert cluster.seats((shape_of(1, 0, 1, "a100"),)) == ("a",)
    assert cluster.seats((shape_of(1, 0, 1, "", 60 * GIB),)) == ("h",)
    assert cluster.seats((shape_of(1, 0, 0, "h100"),)) == ("c",), "without a GPU its model is no matter"
    assert cluster.has_gpus((shape_of(1, 0, 1, "h100"), shape_of(1, 0, 8, "a100")))
    assert not cluster.has_gpus((shape_of(1, 0, 1, "v100"),))
    assert not cluster.has_gpus((shape_of(1, 0, 1, "a100", 60 * GIB),))


@pytest.mark.parametrize(
    ("sold_gib", "shown_mib"), [(80, 81559), (24, 23028), (16, 15360), (40, 40960)], ids=["H100", "A10", "T4", "A100"]
)
def test_a_gpu_counts_with_the_memory_that_it_is_sold_with(sold_gib, shown_mib):
    cluster = cluster_with(n=shape_of(8, 0, 1, "", shown_mib << 20))
    assert cluster.seats((shape_of(1, 0, 1, "", sold_gib * GIB),)) == ("n",)
    assert not cluster.has_gpus((shape_of(1, 0, 1, "", sold_gib * GIB * 5 // 4),))


def test_a_machine_of_several_models_is_asked_for_none_of_them():
    """Ray gives any of its GPUs, and a job that wants an H100 is not to find an A100."""
    both = "NVIDIA A100-SXM4-40GB, NVIDIA H100 80GB HBM3"
    cluster = cluster_with(mixed=shape_of(8, 0, 2, both, 40 * GIB))
    assert not cluster.has_gpus((shape_of(1, 0, 1, "h100"),))
    assert cluster.seats((shape_of(1, 0, 1),)) == ("mixed",)
    assert cluster.seats((shape_of(1, 0, 1, "nvidia"),)) == ("mixed",), "all of them are"


def test_a_gang_is_packed_onto_few_nodes():
    rooms = {node: empty_room(shape_of(cpus, 0, 0)) for node, cpus in (("a", 2), ("b", 4), ("c", 3))}
    assert pack((shape_of(1, 0, 0),) * 4, rooms) == ("b",) * 4
    assert sorted(pack((shape_of(1, 0, 0),) * 6, rooms)) == ["a", "a", "b", "b", "b", "b"]
    assert pack((shape_of(1, 0, 0),) * 10, rooms) == ()


def test_parts_that_differ_each_find_a_node():
    rooms = {"gpu": empty_room(shape_of(4, 0, 2)), "cpu": empty_room(shape_of(16, 0, 0))}
    server, worker = shape_of(8, 0, 0), shape_of(1, 0, 1)
    assert pack((server, worker, worker), rooms) == ("cpu", "gpu", "gpu")
    assert pack((server, worker, worker, worker), rooms) == ()


def test_a_gang_goes_where_it_was_as_far_as_it_can():
    rooms = {node: empty_room(shape_of(1, 0, 0)) for node in "abcd"}
    part = (shape_of(1, 0, 0),) * 3
    assert pack(part, rooms, ("d", "b", "c")) == ("d", "b", "c")
    del rooms["b"]
    assert pack(part, rooms, ("d", "b", "c")) == ("d", "a", "c")


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 3), repeat=3)))
def test_nothing_is_ever_packed_over_what_there_is(sizes):
    rooms = {f"n{at}": empty_room(shape_of(size, 0, size)) for at, size in enumerate(sizes)}
    for shares in ((1, 0.5, 0.5), (2, 1, 0.3, 0.3, 0.3), (0.6, 0.6, 0.6)):
        parts = tuple(shape_of(0.5, 0, share) for share in shares)
        seats = pack(parts, rooms)
        left = dict(rooms)
        for part, node in zip(parts, seats, strict=False):
            left[node] = left[node].take(part).room
        assert all(min((*room.free.amounts, *room.gpus)) >= 0 for room in left.values())
