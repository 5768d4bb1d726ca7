"""The search for the true peak of a single load, against scans that try everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.planning.kernels import single_load_search as search
from eplb_plugin.planning.kernels import single_load_state as node_state
from eplb_plugin.planning.kernels.lower_bounds import counts_bound
from eplb_plugin.planning.kernels.plan_layers import plan_layers
from eplb_plugin.planning.kernels.single_load_plan import plan_node
from tests.planning.single_load_cases import problem_of

LEAST_GAIN = 1e-5
SLACK = 1e-4


@st.composite
def nodes(draw):
    """A node with loads, many of them alike, and some packing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    capacity = -(-experts // ranks) + draw(st.integers(0, 2))
    room = rng.integers(max(1, capacity - 1), capacity + 1, ranks)
    room[:] = capacity if room.sum() < experts else room
    held = np.concatenate([np.arange(experts), rng.integers(0, experts, room.sum() - experts)])
    rng.shuffle(held)
    weight = np.round(rng.lognormal(1, draw(st.sampled_from([0.5, 2.0])), experts), draw(st.integers(0, 3)))
    node = node_state.new_node(weight * ranks / max(weight.sum(), 1.0), room, capacity)
    node.expert[:] = -1
    for rank, items in enumerate(np.split(held, np.cumsum(room)[:-1])):
        node.expert[rank * capacity : rank * capacity + len(items)] = items
    node_state.refresh_node(node)
    return node, capacity


def loads(expert: np.ndarray, weight: np.ndarray, capacity: int) -> np.ndarray:
    count = np.bincount(expert[expert >= 0], minlength=len(weight))
    share = np.where(expert >= 0, weight[expert] / count[expert], 0.0)
    return share.reshape(-1, capacity).sum(1)


def ranks_of(expert: np.ndarray, capacity: int) -> list[list[int]]:
    return [[e for e in rank if e >= 0] for rank in expert.reshape(-1, capacity).tolist()]


def check(node, capacity: int) -> None:
    """Everything follows from what the slots hold."""
    assert (
        node.replicas.tolist()
        == np.bincount(node.expert[node.expert >= 0], minlength=len(node.weight)).tolist()
    )
    expected = loads(node.expert, node.weight, capacity)
    assert node.load == pytest.approx(expected)
    assert node.order.tolist() == sorted(range(len(expected)), key=lambda rank: (node.load[rank], rank))
    assert (node.order[node.place] == np.arange(len(expected))).all()
    assert (np.diff(node.share.reshape(-1, capacity)) <= 0).all()
    assert [len(rank) for rank in ranks_of(node.expert, capacity)] == node.rank_slots.tolist()


@given(nodes())
@settings(max_examples=150, deadline=None)
def test_the_best_swap_is_within_the_slack_of_the_best_of_all(case):
    node, capacity = case
    check(node, capacity)
    heavy = int(node.order[-1])
    best = node.load[heavy] - LEAST_GAIN
    held = ranks_of(node.expert, capacity)
    for mine, other in itertools.product(
        range(heavy * capacity, (heavy + 1) * capacity), range(len(node.expert))
    ):
        x, y, rank = node.expert[mine], node.expert[other], other // capacity
        if rank != heavy and x >= 0 and y >= 0 and x not in held[rank] and y not in held[heavy]:
            after = node.expert.copy()
            after[mine], after[other] = y, x
            after = loads(after, node.weight, capacity)
            best = min(best, max(after[heavy], after[rank]))
    mine, other = search.best_swap(node, heavy)
    if mine < 0:
        assert best == pytest.approx(node.load[heavy] - LEAST_GAIN, abs=1e-9)
        return
    partner = other // capacity
    assert node.expert[mine] not in held[partner]
    assert node.expert[other] not in held[heavy]
    node_state.make_swap(node, mine, other)
    check(node, capacity)
    assert max(node.load[heavy], node.load[partner]) <= best + SLACK + 1e-9


@given(nodes())
@settings(max_examples=150, deadline=None)
def test_a_change_lowers_the_peak_as_far_as_it_says(case):
    node, capacity = case
    heavy, before = int(node.order[-1]), node.load.max()
    expert, slot = search.best_replica_change(node, heavy)
    if slot < 0:
        return
    held = ranks_of(node.expert, capacity)
    assert expert in held[heavy]
    assert expert not in held[slot // capacity]
    foreseen = search.peak_after_change(node, expert, slot, np.empty(len(node.load)))
    node_state.make_replica_change(node, expert, slot)
    check(node, capacity)
    assert node.load.max() == pytest.approx(foreseen)
    assert node.load.max() < before - LEAST_GAIN / 2


@given(nodes())
@settings(max_examples=100, deadline=None)
def test_the_search_never_raises_the_peak_and_loses_no_expert(case):
    node, capacity = case
    before = node.load.max()
    peak = search.lower_peak(node, 50, 1.0)
    check(node, capacity)
    assert peak == node.load.max() <= before + 1e-9
    assert (node.replicas > 0).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_no_packing_of_the_replicas_is_below_the_bound_of_the_counts(weight, ranks, spare):
    """All packings of few replicas, also those in which an expert shares a rank with itself."""
    count = np.ones(len(weight), np.int64)
    for at in range(spare):
        count[at % len(weight)] += 1
    capacity = -(-int(count.sum()) // ranks)
    replicas = [e for e, number in enumerate(count) for _ in range(number)]
    # Whatever does not fill the ranks holds an expert without load.
    share = [weight[e] / count[e] for e in replicas] + [0.0] * (ranks * capacity - len(replicas))
    weight, count = [*weight, 0], [*count, ranks * capacity - len(replicas)]
    if count[-1] == 0:
        weight, count = weight[:-1], count[:-1]
    if len(share) > 7:
        return
    peaks = (
        max(sum(order[at : at + capacity]) for at in range(0, len(order), capacity))
        for order in itertools.permutations(share)
    )
    bound = counts_bound(np.array(weight, np.float64), np.array(count, np.int64), np.full(ranks, capacity))
    assert bound <= min(peaks) + 1e-9


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of noise, which wraps around
def test_compiled_and_interpreted_search_agree():
    """The oracles above run the search as plain Python."""
    weight = np.random.default_rng(0).lognormal(0, 1, 20)
    room = np.full(4, 6)
    compiled, interpreted = np.empty((2, 24), np.int64)
    problem = problem_of(weight, room)
    plan_layers(problem, 0, 1, compiled[None])
    load = (weight * (4 / sum(weight))).astype(np.float32)  # as `plan_layers` scales it
    target = max(1.0, float(load.sum(dtype=np.float64)) / 4) + problem.tolerance
    plan_node(problem, load, room, target, interpreted)
    assert compiled.tolist() == interpreted.tolist()


@pytest.mark.parametrize(("groups", "nodes", "ranks"), [(8, 4, 32), (8, 2, 16), (1, 1, 32)])
def test_zipf_loads_are_planned_to_a_tenth_of_a_percent(groups, nodes, ranks):
    """The hottest experts get as many replicas as can be isolated, not as many as greedy counts say."""
    generator = torch.Generator().manual_seed(0)
    falling = 1e5 / torch.arange(1, 257)
    load = torch.stack([falling[torch.randperm(256, generator=generator)] for _ in range(40)])
    topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=288, num_groups=groups)
    plan = eplb.plan(load, topology)
    peak = eplb.rank_loads(load, plan.placement, topology).amax(2)[0]
    assert float((peak / plan.lower_bound).mean()) < 1.001


@pytest.mark.parametrize("draw", ["lognormal", "zipf"])
@pytest.mark.parametrize(
    ("experts", "slots", "groups", "nodes", "ranks"),
    [(256, 288, 8, 4, 32), (64, 80, 8, 2, 8), (256, 288, 1, 1, 32), (60, 64, 1, 1, 8), (512, 576, 1, 1, 64)],
)
def test_steep_loads_are_planned_close_to_their_bound(draw, experts, slots, groups, nodes, ranks):
    """One expert may have a third of all tokens, and few ranks that it can be on."""
    generator = torch.Generator().manual_seed(3)
    falling = 1e6 / torch.arange(1, experts + 1) ** 1.3
    loads = {
        "lognormal": torch.empty(24, experts).log_normal_(6, 2.2, generator=generator).round(),
        "zipf": torch.stack([falling[torch.randperm(experts, generator=generator)] for _ in range(24)]),
    }
    topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)
    plan = eplb.plan(loads[draw], topology)
    gap = eplb.rank_loads(loads[draw], plan.placement, topology).amax(2)[0] / plan.lower_bound - 1
    assert float(gap.median()) < 0.001
    assert float(gap.mean()) < 0.005
