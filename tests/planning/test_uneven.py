"""Ranks with different numbers of slots: the rules, the optimum of tiny cases, and what says no."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.formats.placements import write_placement
from eplb_plugin.offline.simulation import simulate
from eplb_plugin.offline.traces import LoadTrace
from eplb_plugin.planning import planner
from eplb_plugin.planning.anti_affinity import replace_repeats, shared_replicas
from tests.planning.elastic_cases import check_plan, random_load, random_table


def uneven(*rank_slots: int, **numbers: int) -> eplb.Topology:
    return eplb.Topology(
        num_ranks=len(rank_slots), num_slots=sum(rank_slots), rank_slots=rank_slots, **numbers
    )


@st.composite
def cases(draw) -> tuple[eplb.Topology, int, int]:
    """A topology of one to three nodes, experts that fit, and a seed."""
    nodes = draw(st.integers(1, 3))
    per_node = draw(st.integers(1, 4))
    if draw(st.booleans()):  # nodes that are alike
        node = draw(st.lists(st.integers(0, 6), min_size=per_node, max_size=per_node))
        rank_slots = node * nodes
    else:
        size = per_node * nodes
        rank_slots = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    rank_slots[0] += nodes * (sum(rank_slots) == 0)
    groups = draw(st.sampled_from([1, nodes]))
    most = max(1, sum(rank_slots) // groups)
    experts = min(groups * draw(st.integers(max(1, most // 2), most)), sum(rank_slots))
    return uneven(*rank_slots, num_nodes=nodes, num_groups=groups), experts, draw(st.integers(0, 2**20))


@given(cases(), st.integers(1, 3), st.sampled_from(["adaptive", "greedy"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rules_hold_whatever_slots_ranks_have(case, snapshots, policy, priced):
    topology, experts, seed = case
    load = random_load(snapshots, 2, experts, seed=seed)
    options = eplb.PlannerOptions(policy=policy, move_price=0.0025 if priced else 0)
    first = eplb.plan(load, topology, options=options)
    check_plan(load, topology, first)
    if first.hierarchical and topology.num_groups > 1:
        node_of = topology.rank_of_slot() // topology.ranks_per_node
        for row in first.placement.physical_to_logical:
            for group in range(topology.num_groups):
                assert len(set(node_of[row // (experts // topology.num_groups) == group].tolist())) == 1
    load = random_load(snapshots, 2, experts, seed=seed + 1)
    again = eplb.plan(load, topology, first.placement, options)
    check_plan(load, topology, again, first.placement.physical_to_logical)
    table = random_table(2, experts, topology.num_slots, 0.4, seed)
    alive = [bool((seed >> rank) & 1) for rank in range(topology.num_ranks)]
    left = sum(n for n, lives in zip(topology.slots_by_rank, alive, strict=True) if lives)
    if left >= experts:
        planned = eplb.plan(load, topology, table, options, active_ranks=alive)
        check_plan(load, topology, planned, table, alive)


def best_peak(load: list[float], rank_slots: tuple[int, ...]) -> float:
    """The lowest peak of all placements, one by one."""
    ids = range(len(load))
    best = float("inf")
    for ranks in itertools.product(*(itertools.combinations_with_replacement(ids, n) for n in rank_slots)):
        count = [sum(rank.count(expert) for rank in ranks) for expert in ids]
        if min(count):
            best = min(best, max(sum(load[e] / count[e] for e in rank) for rank in ranks))
    return best


@pytest.mark.parametrize(
    ("rank_slots", "experts", "share"),
    # Two even ranks of three slots for four experts come to 1.06. A rank with more slots than there are
    # experts has to repeat some, and which ones is not searched for.
    [((3, 2), 4, 1.06), ((3, 1, 2), 4, 1.12), ((2, 0, 3), 4, 1.06), ((1, 2, 2), 5, 1.001), ((4, 1), 3, 1.35)],
)
def test_peaks_are_near_the_optimum_of_tiny_cases(rank_slots, experts, share):
    load = random_load(16, experts, seed=experts)
    topology = uneven(*rank_slots)
    best = torch.tensor([best_peak(row, rank_slots) for row in load.tolist()], dtype=torch.float64)
    scratch = eplb.plan(load, topology)
    cheap = eplb.PlannerOptions(move_price=0.001)
    grown = eplb.plan(load, topology, eplb.plan(load.flip(1), topology).placement, cheap)
    for planned in (scratch, grown):
        peak = eplb.rank_loads(load, planned.placement, topology)[0].amax(1)
        assert (peak >= best * (1 - 1e-9)).all()
        assert float((peak / best).mean()) <= share + 1e-9
        assert (planned.lower_bound <= best * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    "rank_slots", [(14, 14, 12, 12, 12, 12, 10, 10), (16, 16, 12, 12, 10, 10, 10, 10), (24, *[12] * 6, 0)]
)
def test_balance_is_near_that_of_even_ranks(rank_slots):
    load = random_load(1, 6, 64, sigma=0.8)
    planned = eplb.plan(load, uneven(*rank_slots))
    peak = eplb.rank_loads(load, planned.placement, uneven(*rank_slots)).amax(2).mean(0)
    assert float((peak / planned.lower_bound).mean()) <= 1.02
    assert planned.shared_replicas == 0


def test_even_numbers_are_none():
    plain = eplb.Topology(num_nodes=2, num_ranks=4, num_slots=12)
    given_as = eplb.Topology(num_nodes=2, num_ranks=4, num_slots=12, rank_slots=(3, 3, 3, 3))
    assert given_as == plain
    assert hash(given_as) == hash(plain)
    assert given_as.rank_slots is None
    assert given_as.is_even
    assert uneven(0, 0, 4).slots_by_rank == (0, 0, 4)


def test_slots_of_ranks_and_back():
    topology = uneven(2, 0, 3)
    assert topology.rank_of_slot().tolist() == [0, 0, 2, 2, 2]
    assert [topology.slots_of_rank(rank) for rank in range(3)] == [slice(0, 2), slice(2, 2), slice(2, 5)]
    values = torch.arange(10).view(2, 5)
    padded = topology.by_rank(values, -1)
    assert padded[1].tolist() == [[5, 6, -1], [-1, -1, -1], [7, 8, 9]]
    assert torch.equal(topology.from_ranks(padded), values)


@pytest.mark.parametrize(
    ("rank_slots", "message"),
    [
        ((3, 3), r"\(3, 3\) is for 2 ranks, num_ranks=3"),
        ((3, 3, 3), r"\(3, 3, 3\) are 9 slots in all, num_slots=8"),
        ((9, -1, 0), r"rank_slots\[1\]=-1 is below 0"),
        ((4, 4.0, 0), r"rank_slots\[1\]=4.0 is not an integer"),
        (8, "rank_slots is of type int, not integers"),
        ((8, True, 0), r"rank_slots\[1\]=True is not an integer"),
    ],
)
def test_bad_numbers_are_named(rank_slots, message):
    with pytest.raises(eplb.TopologyError, match=message):
        eplb.Topology(num_ranks=3, num_slots=8, rank_slots=rank_slots)


def test_what_needs_even_ranks_says_so(tmp_path):
    topology = uneven(3, 1, num_nodes=2, num_groups=2)
    load = torch.ones(1, 4)
    for wrong in (lambda: topology.slots_per_rank, lambda: topology.slots_per_node):
        with pytest.raises(eplb.TopologyError, match=r"rank_slots=\(3, 1\)"):
            wrong()
    with pytest.raises(eplb.TopologyError, match=r"'ensemble' .* not \(3, 1\)"):
        eplb.plan(load, topology, options=eplb.PlannerOptions(policy="ensemble"))
    placement = eplb.plan(load, topology).placement
    with pytest.raises(eplb.TopologyError, match=r"no room for rank_slots=\(3, 1\)"):
        write_placement(tmp_path / "a.json", placement, (0,), topology, "sglang")


def test_nodes_that_differ_are_planned_globally_and_say_so(caplog, monkeypatch):
    monkeypatch.setattr(planner, "_warned", set())
    topology = uneven(4, 4, 6, 2, num_nodes=2, num_groups=2)
    with caplog.at_level("INFO", "eplb_plugin"):
        planned = [eplb.plan(random_load(1, 12), topology) for _ in range(2)]
    assert not planned[0].hierarchical
    assert [record.getMessage() for record in caplog.records] == [
        "planning globally: the 2 nodes differ in the slots of their living ranks: (4, 4, 6, 2)"
    ]


def test_repeats_become_replicas_of_others():
    topology = uneven(3, 2)
    ids = torch.tensor([[0, 0, 1, 2, 3]])
    repaired = replace_repeats(ids, torch.tensor([[[2.0, 1.0, 4.0, 3.0]]], dtype=torch.float64), topology)
    assert not shared_replicas(repaired, topology).any()
    assert repaired.tolist() == [[0, 2, 1, 2, 3]]


def test_the_simulator_and_the_warmup_take_uneven_ranks():
    topology = uneven(5, 3, 4)
    trace = LoadTrace((random_load(1, 2, 8) * random_load(24, 2, 8, seed=1, sigma=0.1)).to(torch.int64))
    result = simulate(trace, topology, "adaptive", 8, snapshots=2)
    assert result.balancedness > simulate(trace, topology, "static", 8).balancedness
    eplb.warmup(topology)
