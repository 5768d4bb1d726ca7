"""Two slots a rank: pairs, replica counts and plans, against exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.planning.kernels import single_load_counts as counts
from eplb_plugin.planning.kernels import single_load_pairs as pairing
from eplb_plugin.planning.kernels.api import plan_from_scratch
from eplb_plugin.planning.kernels.lpt_packing import pack_lpt
from eplb_plugin.planning.kernels.single_load_plan import plan_node
from tests.planning.single_load_cases import problem_of

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # of pseudo-random words, which wrap

PUBLIC_LOAD = (600, 560, 120, 120, 20, 10, 10, 10)  # vllm issue 37656, on eight ranks of two slots


def packings_of_pairs(replicas: list[int]) -> Iterator[list[tuple[int, int]]]:
    """All ways to pair replicas such that no pair has an expert twice."""
    if not replicas:
        yield []
        return
    first, rest = replicas[0], replicas[1:]
    for other in sorted(set(rest) - {first}):
        left = rest.copy()
        left.remove(other)
        for pairs in packings_of_pairs(left):
            yield [(first, other), *pairs]


def best_peak_of_counts(weight: np.ndarray, count: list[int]) -> float:
    """The lowest peak of all packings of given replicas on different ranks."""
    share = weight / np.array(count)
    replicas = [expert for expert, number in enumerate(count) for _ in range(number)]
    return min(max(share[a] + share[b] for a, b in pairs) for pairs in packings_of_pairs(replicas))


def all_counts(experts: int, slots: int, most: int) -> Iterator[list[int]]:
    """All replica counts with at most `most` of each expert."""
    for bars in itertools.combinations(range(slots - 1), experts - 1):
        edges = np.array([-1, *bars, slots - 1])
        count = np.diff(edges).tolist()
        if max(count) <= most:
            yield count


def heaviest_with_lightest(weight: np.ndarray, count: list[int]) -> float:
    """The peak of sorted replicas, the heaviest with the lightest, even where an expert meets itself."""
    share = np.sort(np.repeat(weight / np.array(count), count))
    return float((share + share[::-1]).max())


@st.composite
def replicas_of_pairs(draw):
    """Loads, with ties, and replica counts for ranks of two slots."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    ranks = draw(st.integers(1, 5))
    experts = draw(st.integers(2, min(2 * ranks, 6)))
    count = np.ones(experts, np.int64)
    for _ in range(2 * ranks - experts):
        count[rng.choice(np.flatnonzero(count < ranks))] += 1
    weight = np.round(
        rng.lognormal(1, draw(st.sampled_from([0.2, 1.0, 2.0])), experts), draw(st.integers(0, 2))
    )
    # Without any load, ranks stay level whatever LPT packing puts there, and two replicas may share one.
    return np.maximum(weight, 0.01), count, ranks


@given(replicas_of_pairs())
@settings(max_examples=300, deadline=None)
def test_no_packing_of_given_replicas_is_below_their_heaviest_pair(case):
    weight, count, ranks = case
    pairs = pairing.paired_replicas(weight, count, ranks)
    peak, heavy, light = pairing.heaviest_pair(pairs, np.inf)
    assert peak == pytest.approx(best_peak_of_counts(weight, count.tolist()))
    assert peak == pytest.approx(pairs.share[pairs.order[[heavy, light]]].sum())
    # LPT packing attains it, with replicas on different ranks.
    packed = np.empty(2 * ranks, np.int64)
    pack_lpt(weight, count, np.zeros(len(weight), np.int64), ranks, np.full(ranks, 2), 0, 0, packed)
    by_rank = packed.reshape(ranks, 2)
    assert (by_rank[:, 0] != by_rank[:, 1]).all()
    assert (weight / count)[by_rank].sum(1).max() == pytest.approx(peak)


@given(replicas_of_pairs(), st.integers(0, 2**20))
@settings(max_examples=200, deadline=None)
def test_the_order_stays_right_from_change_to_change(case, seed):
    weight, count, ranks = case
    rng = np.random.default_rng(seed)
    pairs = pairing.paired_replicas(weight, count.copy(), ranks)
    for _ in range(20):
        expert, number = int(rng.integers(len(weight))), int(rng.integers(1, ranks + 1))
        pairing.set_count(pairs, expert, number)
        assert pairs.replicas[expert] == number
        assert pairs.share == pytest.approx(weight / pairs.replicas)
        assert (np.diff(pairs.share[pairs.order]) <= 0).all()
        assert (pairs.order[pairs.place] == np.arange(len(weight))).all()


@given(replicas_of_pairs(), st.floats(0.0, 1.5))
@settings(max_examples=200, deadline=None)
def test_a_pass_ends_at_its_limit_at_the_earliest(case, share):
    weight, count, ranks = case
    pairs = pairing.paired_replicas(weight, count, ranks)
    peak = pairing.heaviest_pair(pairs, np.inf)[0]
    ended = pairing.heaviest_pair(pairs, peak * share)[0]
    assert ended == peak if share > 1.0 else peak * share <= ended <= peak


@pytest.mark.parametrize("sigma", [0.5, 1.5, 2.5])
@pytest.mark.parametrize(("experts", "ranks"), [(3, 4), (5, 4), (6, 5), (4, 6)])
def test_small_plans_are_the_best_of_all(experts, ranks, sigma):
    """Of all replica counts and all packings with replicas on different ranks."""
    generator = torch.Generator().manual_seed(experts)
    load = torch.empty(8, experts).log_normal_(6, sigma, generator=generator).round() + 1
    topology = eplb.Topology(num_ranks=ranks, num_slots=2 * ranks)
    plan = eplb.plan(load, topology)
    peaks = eplb.rank_loads(load, plan.placement, topology).amax(2)[0]
    for row, peak in zip(load.numpy(), peaks.tolist(), strict=True):
        best = min(best_peak_of_counts(row, count) for count in all_counts(experts, 2 * ranks, ranks))
        assert best * (1 - 1e-6) <= peak <= best * (1 + 1e-6) + 5e-4 * row.sum() / ranks


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_a_search_gets_near_the_best_of_all_counts(monkeypatch, sigma):
    """The search that larger cases take, for loads whose counts can all be tried. As plain Python."""
    rng = np.random.default_rng(3)
    gaps = []
    for _ in range(6):
        weight = rng.lognormal(0, sigma, 7)
        weight *= 6 / weight.sum()
        room = np.full(6, 2)
        best = counts.pair_counts(weight, room, 1.0, 5e-4, 0)[0]
        with monkeypatch.context() as patch:
            patch.setattr(counts, "_MOST_COUNTS", -1)
            gaps.append(counts.pair_counts(weight, room, 1.0, 5e-4, 0)[0] / best - 1)
    assert min(gaps) >= -1e-9
    assert max(gaps) < 0.05
    assert np.mean(gaps) < 0.01


def test_the_load_of_a_public_report_is_planned_to_its_optimum():
    weight = np.array(PUBLIC_LOAD, np.float64)
    topology = eplb.Topology(num_ranks=8, num_slots=16)
    plan = eplb.plan(torch.tensor([PUBLIC_LOAD]), topology)
    peak = float(eplb.rank_loads(torch.tensor([PUBLIC_LOAD]), plan.placement, topology).max())
    assert heaviest_with_lightest(weight, [4, 4, 2, 2, 1, 1, 1, 1]) == 200
    assert peak == pytest.approx(min(heaviest_with_lightest(weight, c) for c in all_counts(8, 16, 8)))
    assert peak == pytest.approx(590 / 3)  # 560 / 3 beside 10


# Peak over the bound of FlashLB (vllm-ascend 0.23), means of the same loads, from `benchmarks/bench_plan.py`.
FLASHLB = {
    (8, 16, 8): (1.0474, 1.0757, 1.0977, 1.0970, 1.1105),
    (16, 32, 16): (1.0417, 1.0619, 1.0833, 1.1004, 1.0858),
    (32, 64, 32): (1.0288, 1.0571, 1.0687, 1.0786, 1.0680),
    (16, 24, 8): (1.0195, 1.0288, 1.0347, 1.0463, 1.0415),
}


@pytest.mark.parametrize("size", FLASHLB)
def test_the_mean_over_the_bound_is_below_that_of_flashlb(size):
    experts, slots, ranks = size
    topology = eplb.Topology(num_ranks=ranks, num_slots=slots)
    for sigma, theirs in zip((0.5, 1.0, 1.5, 2.0, 2.5), FLASHLB[size], strict=True):
        load = torch.empty(24, experts)
        load.log_normal_(6, sigma, generator=torch.Generator().manual_seed(0)).round_().clamp_(min=1)
        plan = eplb.plan(load, topology)
        peaks = eplb.rank_loads(load, plan.placement, topology).amax(2)[0]
        assert float((peaks / plan.lower_bound).mean()) < theirs - 0.008


@pytest.mark.parametrize(("nodes", "groups"), [(1, 1), (2, 4)])
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_replicas_are_on_different_ranks_of_their_node(nodes, groups, sigma):
    generator = torch.Generator().manual_seed(1)
    load = torch.empty(30, 16).log_normal_(3, sigma, generator=generator).round()
    topology = eplb.Topology(num_nodes=nodes, num_ranks=16, num_slots=32, num_groups=groups)
    ids = eplb.plan(load, topology).placement.physical_to_logical.view(30, 16, 2)
    assert (ids[:, :, 0] != ids[:, :, 1]).all()
    group_of_rank = ids.view(30, nodes, -1) // (16 // groups)
    assert all(len(node.unique()) == groups // nodes for layer in group_of_rank for node in layer)


@given(st.integers(0, 2**20), st.integers(2, 8), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_ranks_that_lack_slots_are_planned_as_well(seed, experts, ranks):
    """Of two slots, some have one or none. As plain Python."""
    rng = np.random.default_rng(seed)
    room = rng.integers(0, 3, ranks)
    room[0] = 2
    experts = min(experts, int(room.sum()))
    load = rng.lognormal(1, 1.5, experts).astype(np.float32)
    load *= ranks / load.sum()
    packed = np.empty(2 * ranks, np.int64)
    peak = plan_node(problem_of(load, room), load, room, load.sum() / ranks, packed)
    by_rank = packed.reshape(ranks, 2)
    assert ((by_rank >= 0).sum(1) == room).all()
    assert (by_rank[room == 1, 0] >= 0).all()
    count = np.bincount(packed[packed >= 0], minlength=experts)
    assert (count > 0).all()
    share = np.append(load.astype(np.float64) / count, 0.0)
    assert share[by_rank].sum(1).max() == pytest.approx(peak)
    assert (by_rank[:, 0] != by_rank[:, 1])[room > 0].all()
    # No packing of the same replicas is better: ranks of one slot take the heaviest.
    full = np.concatenate([share[:-1][packed[packed >= 0]], np.zeros((room == 1).sum())])
    full.sort()
    assert (full + full[::-1]).max() <= peak + 1e-9


@pytest.mark.parametrize("experts", [8, 40])
def test_compiled_and_interpreted_counts_agree(experts):
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 1.5, experts).astype(np.float32)
    load *= np.float32(experts / load.sum())
    room = np.full(experts, 2)
    room[-2:] = 1
    interpreted = np.empty(2 * experts, np.int64)
    problem = problem_of(load, room)
    target = max(1.0, float(load.sum(dtype=np.float64)) / experts) + problem.tolerance
    plan_node(problem, load, room, target, interpreted)
    topology = eplb.Topology(num_ranks=experts, num_slots=int(room.sum()), rank_slots=tuple(room.tolist()))
    compiled = plan_from_scratch(
        torch.from_numpy(load.astype(np.float64))[None, None],
        topology,
        torch.zeros(1, experts, dtype=torch.int64),
        candidates=4,
        patience=1,
    )
    assert compiled[0].tolist() == interpreted[interpreted >= 0].tolist()


def test_few_spare_slots_are_not_worth_a_search():
    """One spare slot for more than four ranks: greedy counts, whatever the seed."""
    rng = np.random.default_rng(0)
    weight = rng.lognormal(0, 1, 18)
    weight *= 10 / weight.sum()
    one = [counts.pair_counts(weight, np.full(10, 2), 1.0, 5e-4, seed)[2].tolist() for seed in range(3)]
    assert one[0] == one[1] == one[2]
    few = np.sort(counts.pair_counts(weight[:-1], np.full(9, 2), 1.0, 5e-4, 0)[2])
    assert few.tolist() == [1] * 16 + [2]


def test_counts_of_several_nodes_are_those_of_each_node():
    rng = np.random.default_rng(5)
    total, node = rng.lognormal(0, 1.5, 12), rng.permutation(np.arange(12) % 2)
    total *= 8 / total.sum()
    count = np.zeros(12, np.int64)
    assert counts.pair_counts_by_node(total, node, np.full(8, 2), 4, 5e-4, 0, count)
    for here in range(2):
        alone = counts.pair_counts(total[node == here], np.full(4, 2), 0.0, 5e-4, 0)[2]
        assert count[node == here].tolist() == alone.tolist()
    assert not counts.pair_counts_by_node(total, node, np.full(8, 2), 4, 5e-4, 0, count)
    uneven = np.array([2, 2, 2, 1] * 2)
    assert not counts.pair_counts_by_node(total, node, uneven, 4, 5e-4, 0, count)
    assert not counts.pair_counts_by_node(total, node, np.full(8, 3), 4, 5e-4, 0, count)


@pytest.mark.parametrize("nodes", [1, 2])
def test_plans_of_snapshots_from_scratch_use_the_counts_where_they_lower_the_peaks(nodes):
    """Steady traffic: the mean peak is near that of a plan of the sum, far below that of greedy counts."""
    generator = torch.Generator().manual_seed(2)
    base = torch.empty(1, 24, 16).log_normal_(6, 1.5, generator=generator)
    load = (base * torch.empty(8, 24, 16).log_normal_(0, 0.02, generator=generator)).round()
    topology = eplb.Topology(num_nodes=nodes, num_ranks=16, num_slots=32, num_groups=2 * nodes)

    def peak(placement: eplb.Placement) -> float:
        return float(eplb.rank_loads(load, placement, topology).amax(2).mean())

    greedy = eplb.plan(load, topology, options=eplb.PlannerOptions(policy="greedy")).placement
    of_sum = eplb.plan(load.sum(0), topology).placement
    of_snapshots = eplb.plan(load, topology).placement
    assert peak(of_snapshots) < 1.02 * peak(of_sum)
    assert peak(of_snapshots) < 0.9 * peak(greedy)
