"""The lower bound against the best of all placements, found by trying them."""

from __future__ import annotations

import itertools

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.planning.bounds import _heaviest_node


def best_peak(load: list[float], topology: eplb.Topology) -> float:
    """The lowest peak of any placement that holds every expert."""
    best = float("inf")
    slots, per_rank = topology.num_slots, topology.slots_per_rank
    for ids in itertools.product(range(len(load)), repeat=slots):
        if len(set(ids)) < len(load):
            continue
        ranks = [ids[at : at + per_rank] for at in range(0, slots, per_rank)]
        best = min(best, max(sum(load[e] / ids.count(e) for e in rank) for rank in ranks))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("experts", "ranks", "slots"), [(3, 2, 4), (4, 2, 6), (3, 3, 6), (2, 2, 4)])
def test_no_placement_is_below_the_bound(experts, ranks, slots, seed):
    generator = torch.Generator().manual_seed(seed)
    load = torch.empty(1, experts, dtype=torch.float64).log_normal_(2, 1.5, generator=generator)
    topology = eplb.Topology(num_ranks=ranks, num_slots=slots)
    planned = eplb.plan(load, topology)
    optimum = best_peak(load[0].tolist(), topology)
    peak = eplb.rank_loads(load, planned.placement, topology).max().item()
    assert planned.lower_bound.item() <= optimum * (1 + 1e-9)
    assert peak >= optimum * (1 - 1e-9)


def test_one_hot_expert_is_bounded_by_its_replicas():
    topology = eplb.Topology(num_ranks=8, num_slots=16)
    load = torch.tensor([[900.0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    # Thirteen experts leave three spare slots: the hot one can have four replicas at most.
    assert eplb.plan(load, topology).lower_bound.item() == pytest.approx(225)


def test_the_heaviest_group_bounds_its_node():
    topology = eplb.Topology(num_nodes=2, num_ranks=4, num_slots=8, num_groups=4)
    load = torch.tensor([[50.0, 50, 1, 1, 2, 2, 3, 3]])
    assert eplb.plan(load, topology).lower_bound.item() == pytest.approx((100 + 2) / 2)


@pytest.mark.parametrize(("groups", "nodes"), [(4, 2), (6, 3), (6, 2), (8, 4), (4, 4)])
def test_the_heaviest_node_is_bounded_however_groups_are_packed(groups, nodes):
    generator = torch.Generator().manual_seed(groups * nodes)
    load = torch.empty(20, 1, groups, dtype=torch.float64).log_normal_(0, 0.7, generator=generator)
    bound = _heaviest_node(load, nodes)[:, 0]
    orders = torch.tensor(sorted(set(itertools.permutations(range(groups))))[:: 1 if groups < 8 else 3])
    optimum = load[:, 0, orders].unflatten(2, (nodes, -1)).sum(3).amax(2).amin(1)
    assert bool((bound <= optimum * (1 + 1e-12)).all())
    if (groups <= 2 * nodes or nodes == 2) and groups < 8:
        torch.testing.assert_close(bound, optimum)


def test_a_hot_expert_is_bounded_by_the_slots_that_other_groups_leave():
    topology = eplb.Topology(num_nodes=2, num_ranks=8, num_slots=16, num_groups=4)
    load = torch.tensor([[300.0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    # A node has eight slots; three are the other group's, two its own group's: three replicas.
    assert eplb.plan(load, topology).lower_bound.item() == pytest.approx(100)
