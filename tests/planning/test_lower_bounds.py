"""The lower bound against the best of all placements, found by trying them."""

from __future__ import annotations

import itertools

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.planning import lower_bounds
from eplb_plugin.planning.hierarchy import MOST_PACKINGS, best_nodes, num_packings, packings
from eplb_plugin.planning.kernels.api import shared_bounds
from eplb_plugin.planning.lower_bounds import _heaviest_node


def best_peak(load: list[float], rank_slots: tuple[int, ...]) -> float:
    """The lowest peak of any placement that holds every expert."""
    best = float("inf")
    ends = list(itertools.accumulate(rank_slots))
    for ids in itertools.product(range(len(load)), repeat=ends[-1]):
        if len(set(ids)) < len(load):
            continue
        ranks = [ids[end - slots : end] for end, slots in zip(ends, rank_slots, strict=True)]
        best = min(best, max(sum(load[e] / ids.count(e) for e in rank) for rank in ranks))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("experts", "ranks", "slots"), [(3, 2, 4), (4, 2, 6), (3, 3, 6), (2, 2, 4)])
def test_no_placement_is_below_the_bound(experts, ranks, slots, seed):
    generator = torch.Generator().manual_seed(seed)
    load = torch.empty(1, experts, dtype=torch.float64).log_normal_(2, 1.5, generator=generator)
    topology = eplb.Topology(num_ranks=ranks, num_slots=slots)
    planned = eplb.plan(load, topology)
    optimum = best_peak(load[0].tolist(), topology.slots_by_rank)
    peak = eplb.rank_loads(load, planned.placement, topology).max().item()
    assert planned.lower_bound.item() <= optimum * (1 + 1e-9)
    assert peak >= optimum * (1 - 1e-9)


# Ranks with equal and with unequal slots, few and many spare ones; steep loads, whose hottest expert is on
# all ranks but one, or on all of them and more than once on some.
@pytest.mark.parametrize("sigma", [0.7, 2.0, 4.0])
@pytest.mark.parametrize(
    ("experts", "rank_slots"),
    [
        (4, (2, 2, 2)),
        (4, (3, 3)),
        (3, (2, 2, 2)),
        (2, (3, 3)),
        (4, (1, 2, 3)),
        (3, (1, 1, 3)),
        (5, (2, 2, 2)),
    ],
)
def test_ranks_that_share_experts_are_not_below_their_bound(experts, rank_slots, sigma):
    generator = torch.Generator().manual_seed(int(10 * sigma) + len(rank_slots))
    load = torch.empty(8, experts, dtype=torch.float64).log_normal_(2, sigma, generator=generator)
    optimum = torch.tensor([best_peak(row, rank_slots) for row in load.tolist()], dtype=torch.float64)
    bound = shared_bounds(load, rank_slots)
    assert bool((bound <= optimum * (1 + 1e-12)).all())
    # Of steep loads it is the optimum most of the time, or nearly so.
    assert sigma < 1 or float((bound / optimum).median()) > 0.95


@pytest.mark.parametrize(("groups", "nodes"), [(4, 2), (6, 3), (6, 2), (4, 4), (4, 1), (8, 4)])
def test_groups_are_packed_in_the_best_of_all_ways(groups, nodes):
    generator = torch.Generator().manual_seed(groups + nodes)
    load = torch.empty(3, 5, groups, dtype=torch.float64).log_normal_(0, 0.7, generator=generator)
    every = list(packings(groups, nodes))
    assert len(every) == num_packings(groups, nodes) == len({frozenset(map(frozenset, p)) for p in every})
    node = best_nodes(load, nodes)
    assert (node.sort(1).values == torch.arange(groups) // (groups // nodes)).all()
    packed = torch.zeros(3, 5, nodes, dtype=torch.float64).scatter_add_(2, node.expand_as(load), load)
    orders = torch.tensor(sorted(set(itertools.permutations(range(groups))))[:: 1 if groups < 8 else 3])
    optimum = load[:, :, orders].unflatten(3, (nodes, -1)).sum(4).amax(3).sum(0).amin(1)
    assert bool((packed.amax(2).sum(0) <= optimum * (1 + 1e-12)).all())


def test_one_hot_expert_is_bounded_by_its_replicas():
    topology = eplb.Topology(num_ranks=8, num_slots=16)
    load = torch.tensor([[900.0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    # Thirteen experts leave three spare slots: the hot one can have four replicas, each beside another.
    assert eplb.plan(load, topology).lower_bound.item() == pytest.approx(226)


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
    # A node has eight slots; three are the other group's, two its own group's: three replicas, each beside
    # another expert.
    assert eplb.plan(load, topology).lower_bound.item() == pytest.approx(101)


@pytest.mark.parametrize(("groups", "nodes"), [(8, 4), (10, 2), (14, 7), (12, 12), (1, 1)])
def test_few_packings_are_tried_and_slice_by_slice(groups, nodes, monkeypatch):
    tried = []
    monkeypatch.setattr(
        lower_bounds, "packings", lambda *n: tried.append(len(list(packings(*n)))) or packings(*n)
    )
    topology = eplb.Topology(num_nodes=nodes, num_ranks=nodes, num_slots=nodes * 30, num_groups=groups)
    generator = torch.Generator().manual_seed(groups)
    load = torch.empty(9, 2, groups * 3).log_normal_(0, 3, generator=generator)
    planned = eplb.plan(load, topology)
    peaks = eplb.rank_loads(load, planned.placement, topology).amax(2).mean(0)
    assert bool((planned.lower_bound <= peaks * (1 + 1e-9)).all())
    assert all(number <= MOST_PACKINGS for number in tried)
    assert bool(tried) == (nodes > 1 and num_packings(groups, nodes) <= MOST_PACKINGS)
    for rows in (1, 5, 10):
        monkeypatch.setattr(lower_bounds, "_ROWS_AT_ONCE", rows)
        torch.testing.assert_close(
            lower_bounds.peak_lower_bound(load.double(), topology), planned.lower_bound, rtol=1e-14, atol=0
        )
