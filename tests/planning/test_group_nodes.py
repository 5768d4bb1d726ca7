"""Groups change nodes where that is worth their moves, and go to one node where they span several."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.planning.hierarchy import groups_within_nodes
from eplb_plugin.planning.kernels.api import choose_nodes

VACANT = -2


@st.composite
def cases(draw):
    """A load, a topology, and a placement that has its groups within nodes or not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    nodes, per_node, size = draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ranks, spare = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    groups, experts = nodes * per_node, nodes * per_node * size
    node_slots = -(-per_node * size // ranks) * ranks + spare * ranks
    topology = eplb.Topology(
        num_nodes=nodes, num_ranks=nodes * ranks, num_slots=nodes * node_slots, num_groups=groups
    )
    load = rng.lognormal(0, 1, (draw(st.sampled_from([1, 4])), 2, experts))
    if draw(st.booleans()):
        current = eplb.Placement.default(2, experts, topology.num_slots).physical_to_logical
    else:
        other = torch.from_numpy(rng.lognormal(0, 1, (2, experts)))
        current = eplb.plan(other, topology).placement.physical_to_logical
    return torch.from_numpy(load), topology, current


def cost(load: torch.Tensor, topology: eplb.Topology, node, held: set, price: float) -> float:
    """Of one layer [snapshots, logical]: the heaviest node, as a share of the mean, plus the moves."""
    size = load.shape[1] // topology.num_groups
    of_node = torch.zeros(load.shape[0], topology.num_nodes, dtype=torch.float64)
    moves = 0
    for expert in range(load.shape[1]):
        of_node[:, node[expert // size]] += load[:, expert]
        moves += (expert, node[expert // size]) not in held
    return float(of_node.amax(1).sum() / of_node.sum() * topology.num_nodes) + price * moves


@given(cases(), st.sampled_from([0.0, 0.01, 0.1, 10.0]))
@settings(max_examples=60, deadline=None)
def test_no_exchange_of_two_groups_is_worth_its_moves(case, price):
    load, topology, current = case
    per_rank = price * topology.ranks_per_node
    expert_node, start = choose_nodes(load, topology, current, current, per_rank, 1.0)
    size = load.shape[2] // topology.num_groups
    at_node = torch.arange(topology.num_slots) // topology.slots_per_node
    whole = groups_within_nodes(current, load.shape[2], topology)
    for layer in range(2):
        node = expert_node[layer, ::size].tolist()
        assert expert_node[layer].tolist() == np.repeat(node, size).tolist()
        assert np.bincount(node).tolist() == [topology.num_groups // topology.num_nodes] * topology.num_nodes
        held = set(zip(current[layer].tolist(), at_node.tolist(), strict=True))
        now = cost(load[:, layer], topology, node, held, price)
        for a, b in itertools.combinations(range(len(node)), 2):
            other = node.copy()
            other[a], other[b] = node[b], node[a]
            assert now <= cost(load[:, layer], topology, other, held, price) + 2e-6
        stays = expert_node[layer][current[layer]] == at_node
        if whole[layer]:
            assert torch.equal(start[layer], current[layer])
            assert price < 10 or bool(stays.all())
        else:
            assert torch.equal(start[layer], torch.where(stays, current[layer], VACANT))


@pytest.mark.parametrize("ranks", [8, 16])
def test_the_placement_that_engines_start_from_is_mended_and_not_planned_anew(ranks):
    generator = torch.Generator().manual_seed(0)
    load = torch.empty(4, 6, 256).log_normal_(3, 0.6, generator=generator)
    topology = eplb.Topology(num_nodes=4, num_ranks=ranks, num_slots=288, num_groups=8)
    current = eplb.Placement.default(6, 256, 288)
    assert not groups_within_nodes(current.physical_to_logical, 256, topology).any()
    mended, anew = eplb.plan(load, topology, current), eplb.plan(load, topology)
    assert groups_within_nodes(mended.placement.physical_to_logical, 256, topology).all()
    assert mended.moves < 0.6 * int(eplb.count_moves(current, anew.placement, topology).sum())
    assert mended.balancedness > anew.balancedness - 0.03


@pytest.mark.parametrize("price", [0.009, 100.0])
def test_groups_that_have_become_hot_on_one_node_part_where_moves_are_worth_it(price):
    topology = eplb.Topology(num_nodes=2, num_ranks=4, num_slots=36, num_groups=4)
    even = torch.ones(2, 3, 32, dtype=torch.float64)
    current = eplb.plan(even, topology).placement
    first = current.physical_to_logical[:, 0] // 8
    hot = even.clone()
    for layer in range(3):
        node_of = {int(x) // 8: slot // 18 for slot, x in enumerate(current.physical_to_logical[layer])}
        for group, node in node_of.items():
            if node == node_of[int(first[layer])]:
                hot[:, layer, group * 8 : group * 8 + 8] = 9.0
    options = eplb.PlannerOptions(move_price=price)
    plan = eplb.plan(hot, topology, current, options)
    assert groups_within_nodes(plan.placement.physical_to_logical, 32, topology).all()
    if price < 1:
        assert plan.balancedness > 0.9
    else:
        assert plan.moves == 0


def test_without_load_groups_are_brought_together_all_the_same():
    topology = eplb.Topology(num_nodes=4, num_ranks=8, num_slots=72, num_groups=8)
    load = torch.zeros(2, 3, 64)
    load[:, 1] = 1.0
    plan = eplb.plan(load, topology, eplb.Placement.default(3, 64, 72))
    assert groups_within_nodes(plan.placement.physical_to_logical, 64, topology).all()


def test_a_bound_of_moves_holds_once_groups_are_together():
    generator = torch.Generator().manual_seed(1)
    load = torch.empty(4, 3, 64).log_normal_(3, 2.0, generator=generator)
    topology = eplb.Topology(num_nodes=4, num_ranks=8, num_slots=72, num_groups=8)
    options = eplb.PlannerOptions(max_moves=5, move_price=0.0)
    mended = eplb.plan(load, topology, eplb.Placement.default(3, 64, 72), options).placement
    assert groups_within_nodes(mended.physical_to_logical, 64, topology).all()
    later = load[:, :, torch.randperm(64, generator=generator)]
    after = eplb.plan(later, topology, mended, options).placement
    assert int(eplb.count_moves(mended, after, topology).max()) <= 5


def test_a_node_with_more_groups_than_its_share_gives_some_away():
    topology = eplb.Topology(num_nodes=2, num_ranks=2, num_slots=6, num_groups=4)
    load, current = torch.tensor([[5.0, 2.0, 1.0, 1.0]]), torch.tensor([[1, 2, 3, 0, 0, 0]])
    assert not groups_within_nodes(current, 4, topology).any()
    # A peak of 5, which no placement with two groups on each node has.
    planned = eplb.plan(load, topology, current)
    assert groups_within_nodes(planned.placement.physical_to_logical, 4, topology).all()
    peak = eplb.rank_loads(load, planned.placement, topology).max()
    assert float(peak) == float(planned.lower_bound) == 6
    # What is empty or lost breaks nothing.
    assert groups_within_nodes(torch.tensor([[1, -1, 0, -1, 3, 3]]), 4, topology).all()
    assert not groups_within_nodes(torch.tensor([[1, 2, 0, -1, -1, -1]]), 4, topology).any()
