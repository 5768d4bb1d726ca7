"""Plans for balanced dispatch: what they predict, what they gain, and the rules that they keep."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.core.load import fold_steps
from eplb_plugin.dispatch.rank_costs import even_batch, rank_costs, split_balancedness
from eplb_plugin.planning.balanced_dispatch import expected_samples
from eplb_plugin.planning.kernels.api import improve_splits, split_peaks, step_peaks
from tests.dispatch.cases import best_peak
from tests.runtime.cases import random_placement

BALANCED = eplb.PlannerOptions(dispatch="balanced")


def skewed(seed: int, steps: int, layers: int, logical: int, tokens: int = 800) -> torch.Tensor:
    """Independent Poisson steps of a lognormal load, int64 [steps, layers, logical]."""
    draw = np.random.default_rng(seed)
    share = draw.lognormal(0, 1, (layers, logical))
    return torch.from_numpy(
        draw.poisson(tokens * share / share.sum(1, keepdims=True), (steps, layers, logical))
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), by_rank=st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_peaks_after_the_split_lie_between_the_best_and_the_even_ones(seed: int, by_rank: list[int]) -> None:
    logical = max(1, sum(by_rank) * 2 // 3)
    topology = eplb.Topology(num_ranks=len(by_rank), num_slots=sum(by_rank), rank_slots=tuple(by_rank))
    placement = random_placement(2, logical, topology.num_slots, seed)
    counts = skewed(seed, 3, 2, logical)
    ids = placement.physical_to_logical
    split = split_peaks(counts.double(), ids, topology)
    even = step_peaks(counts.double(), ids, topology)
    assert (split <= even * (1 + 1e-9) + 1e-9).all()
    for step, layer in itertools.product(range(3), range(2)):
        best = best_peak(counts[step, layer].numpy(), ids[layer].numpy(), topology)
        # Water filling may stop at a peak that no single expert can lower.
        assert best - 1e-6 <= split[step, layer] <= max(1.1 * best, best + 2)
    whole = rank_costs(eplb.balance_batch(counts, placement, topology), topology).amax(2)
    assert ((split - whole).abs() <= 0.02 * whole + topology.num_ranks).all()


def test_a_plan_for_balanced_dispatch_is_better_with_it() -> None:
    topology = eplb.Topology(num_ranks=8, num_slots=40)
    load = skewed(1, 96, 3, 32)
    seen, unseen = load[:64], load[64:]
    even = eplb.plan(seen, topology)
    plan = eplb.plan(seen, topology, options=BALANCED)
    assert split_balancedness(unseen, plan.placement, topology).balanced > 0.98
    gain = split_balancedness(unseen, even.placement, topology)
    assert split_balancedness(unseen, plan.placement, topology).balanced > gain.balanced + 0.005
    assert plan.balancedness == pytest.approx(
        split_balancedness(seen, plan.placement, topology).balanced, abs=0.01
    )
    assert (plan.lower_bound >= seen.double().sum(2).mean(0) / 8 - 1e-9).all()
    again = eplb.plan(seen, topology, plan.placement, BALANCED)
    assert again.moves <= 3
    assert split_balancedness(unseen, again.placement, topology).balanced > 0.98


def test_single_steps_are_scaled_to_the_load_that_is_expected_next() -> None:
    load = skewed(1, 24, 2, 9).double()
    expected = skewed(2, 4, 2, 9).double()
    expected[:, 1, 3], load[:, 1, 5], load[:, 1, 6] = 0, 0, 0
    scaled = expected_samples(load, expected)
    for layer in range(2):
        share = expected[:, layer].sum(0) / expected[:, layer].sum()
        seen = load[:, layer].sum(0) / load[:, layer].sum()
        for expert in range(9):
            for step in range(24):
                tokens = load[step, layer].sum()
                factor = share[expert] / seen[expert] if seen[expert] else None
                wanted = share[expert] * tokens if factor is None else load[step, layer, expert] * factor
                assert float(scaled[step, layer, expert]) == pytest.approx(float(wanted))
    assert not expected_samples(load * 0, expected * 0).any()


def test_a_plan_follows_the_load_and_its_chance_the_samples() -> None:
    """Traffic has changed: the snapshots say so, and half of the samples are from before."""
    topology = eplb.Topology(num_ranks=8, num_slots=40)
    before, after = skewed(1, 64, 2, 32), skewed(2, 96, 2, 32)
    start = eplb.plan(before, topology, options=BALANCED).placement
    samples = torch.cat([before, after[:64]])
    plan = eplb.plan(fold_steps(after[:64], 16), topology, start, BALANCED, samples=samples)
    late = eplb.plan(samples, topology, start, BALANCED)
    found, missed = (split_balancedness(after[64:], x.placement, topology).balanced for x in (plan, late))
    assert found > missed + 0.005
    assert plan.balancedness == pytest.approx(
        split_balancedness(samples, plan.placement, topology).balanced, abs=0.01
    )
    assert torch.equal(
        eplb.plan(before, topology, start, BALANCED, samples=before[:0]).placement.physical_to_logical,
        eplb.plan(before, topology, start, BALANCED).placement.physical_to_logical,
    )
    with pytest.raises(eplb.LoadError, match="samples have 2 layers of 31 experts, the load 2 of 32"):
        eplb.plan(before, topology, options=BALANCED, samples=samples[..., 1:])
    with pytest.raises(eplb.LoadError, match="samples"):
        eplb.plan(before, topology, options=BALANCED, samples=-samples)


def test_moves_earn_their_price_and_keep_their_bound() -> None:
    topology = eplb.Topology(num_ranks=8, num_slots=40)
    load = skewed(2, 64, 2, 32)
    start = eplb.Placement.default(2, 32, 40)
    moves = []
    for options in ({"move_price": 0.001}, {"move_price": 0.03}, {"max_moves": 2}, {"move_price": 1000.0}):
        plan = eplb.plan(load, topology, start, eplb.PlannerOptions(dispatch="balanced", **options))
        moves.append(plan.moves)
        assert plan.moves == int(eplb.count_moves(start, plan.placement, topology).sum())
        assert plan.balancedness >= split_balancedness(load, start, topology).balanced - 0.01
    assert moves[0] > moves[1] > moves[3] == 0
    assert 0 < moves[2] <= 4


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 4, 12, 1, 9), (2, 4, 16, 4, 12), (1, 3, 9, 1, 8), (1, 1, 5, 1, 4)]),
    has_current=st.booleans(),
)
def test_rules_are_kept(seed: int, shape: tuple[int, ...], has_current: bool) -> None:
    nodes, ranks, slots, groups, logical = shape
    topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=slots, num_groups=groups)
    load = skewed(seed, 5, 2, logical, tokens=60)
    current = random_placement(2, logical, slots, seed) if has_current else None
    plan = eplb.plan(load, topology, current, BALANCED)
    plan.placement.validate(topology)
    even = eplb.plan(load, topology, current)
    assert plan.shared_replicas <= even.shared_replicas
    if nodes > 1:
        node = torch.arange(slots) // (slots // nodes)
        for row in plan.placement.physical_to_logical:
            for group in range(groups):
                assert len(set(node[row // (logical // groups) == group].tolist())) == 1
    again = eplb.plan(load, topology, current, BALANCED)
    assert torch.equal(again.placement.physical_to_logical, plan.placement.physical_to_logical)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_no_placement_is_below_the_lower_bound(seed: int) -> None:
    """All placements of 3 experts in 4 slots on 2 ranks, each split at best."""
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    load = skewed(seed, 2, 1, 3, tokens=40)
    bound = float(eplb.plan(load, topology, options=BALANCED).lower_bound)
    peaks = []
    for row in itertools.product(range(3), repeat=4):
        if set(row) == {0, 1, 2}:
            peaks.append(np.mean([best_peak(c[0].numpy(), np.array(row), topology) for c in load]))
    assert bound <= min(peaks) + 1e-6


def test_the_better_of_two_starts_is_improved() -> None:
    topology = eplb.Topology(num_ranks=4, num_slots=12)
    load = skewed(3, 16, 1, 9).double()
    good = eplb.plan(load, topology, options=BALANCED).placement.physical_to_logical
    bad = random_placement(1, 9, 12, 8).physical_to_logical
    free = {"price": 1e9, "max_moves": None}
    for starts in ([good, bad], [bad, good]):
        assert torch.equal(improve_splits(load, topology, good, starts, **free), good)
    # With moves at that price, the start in force wins.
    assert torch.equal(improve_splits(load, topology, bad, [good, bad], **free), bad)
    cheap = improve_splits(load, topology, bad, [good, bad], price=0.0, max_moves=None)
    assert split_peaks(load, cheap, topology).sum() <= split_peaks(load, good, topology).sum() * 1.001


def test_steps_without_tokens_and_without_load() -> None:
    topology = eplb.Topology(num_ranks=4, num_slots=12)
    load = skewed(4, 6, 2, 9)
    load[2] = 0
    load[:, 1] = 0
    start = random_placement(2, 9, 12, 4)
    plan = eplb.plan(load, topology, start, BALANCED)
    plan.placement.validate(topology)
    idle = eplb.plan(torch.zeros_like(load), topology, None, BALANCED)
    assert idle.balancedness == 1
    assert not even_batch(torch.zeros_like(load), idle.placement).any()


def test_options() -> None:
    with pytest.raises(eplb.ConfigError, match="dispatch"):
        eplb.PlannerOptions(dispatch="local_first")  # type: ignore[arg-type]
    for policy in ("greedy", "ensemble"):
        plan = eplb.plan(
            skewed(5, 4, 1, 9), eplb.Topology(num_ranks=4, num_slots=12),
            options=eplb.PlannerOptions(policy=policy, dispatch="balanced"),
        )  # fmt: skip
        assert 0 < plan.balancedness <= 1
