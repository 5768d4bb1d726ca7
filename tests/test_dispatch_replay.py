"""Splits of recorded batches: each against a slow oracle, and the linear program against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import eplb_plugin as eplb
from eplb_plugin.dispatch.rank_costs import rank_costs
from eplb_plugin.offline.dispatch_replay import SPLITS, find_split, whole_counts
from eplb_plugin.offline.linear_program import best_split
from tests.dispatch.test_balance_batch import batches, even_split
from tests.dispatch.test_balance_batch import rank_costs as slow_rank_costs

Batch = tuple[torch.Tensor, eplb.Placement, eplb.Topology]
TOPOLOGY = eplb.Topology(num_ranks=8, num_slots=40)


def skewed(steps: int, layers: int = 2) -> tuple[torch.Tensor, eplb.Placement]:
    """Counts of batches of 1024 tokens, and a plan for their mean."""
    draw = np.random.default_rng(3)
    share = draw.lognormal(0, 1, (layers, 32))
    counts = torch.from_numpy(draw.poisson(share / share.sum(1, keepdims=True) * 1024, (steps, layers, 32)))
    return counts, eplb.plan(torch.from_numpy(share), TOPOLOGY).placement


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_every_split_keeps_the_tokens_of_each_expert(batch: Batch) -> None:
    counts, placement, topology = batch
    ids = placement.physical_to_logical
    for name in SPLITS:
        (tokens,) = find_split(name)(counts[None], placement, topology, 0, (1,))
        assert tokens.dtype == torch.int64
        assert tokens.min() >= 0
        assert not tokens[ids < 0].any()
        for layer, expert in itertools.product(range(len(counts)), range(placement.num_logical)):
            assert tokens[layer][ids[layer] == expert].sum() == counts[layer, expert], name


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_the_even_split_is_that_of_a_loop(batch: Batch) -> None:
    counts, placement, topology = batch
    (tokens,) = SPLITS["even"](counts[None], placement, topology, 0, (0,))
    for layer, slots in enumerate(placement.physical_to_logical):
        for expert, count in enumerate(counts[layer].tolist()):
            where = slots == expert
            assert tokens[layer][where].tolist() == even_split(count, int(where.sum()))


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_costs_of_ranks_are_those_of_a_loop(batch: Batch) -> None:
    counts, placement, topology = batch
    (tokens,) = SPLITS["even"](counts[None], placement, topology, 0, (0,))
    for cost in (0, 5, 30):
        for layer, row in enumerate(rank_costs(tokens, topology, cost)):
            assert row.tolist() == slow_rank_costs(tokens[layer].tolist(), topology, cost)


@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_the_linear_program_is_within_a_token_of_the_best_of_all_splits(batch: Batch) -> None:
    """The best split of whole tokens rounds its peak up, and no more: a flow has whole solutions."""
    counts, placement, topology = (batch[0] % 4, *batch[1:])
    (split,) = best_split(counts[None], placement, topology)
    for layer, slots in enumerate(placement.physical_to_logical.tolist()):
        choices = [
            itertools.combinations_with_replacement([s for s, held in enumerate(slots) if held == e], n)
            for e, n in enumerate(counts[layer].tolist())
        ]
        wanted = min(
            max(slow_rank_costs(np.bincount(sum(each, ()), minlength=len(slots)).tolist(), topology, 0))
            for each in itertools.product(*choices)
        )
        peak = float(topology.by_rank(split[layer], 0.0).sum(1).max())
        assert int(np.ceil(peak - 1e-6)) == wanted


def test_each_step_and_layer_has_an_optimum_of_its_own() -> None:
    counts, placement = skewed(3)
    counts[1, 0] = 0
    split = best_split(counts, placement, TOPOLOGY)
    assert split[1, 0].sum() == 0
    peaks = TOPOLOGY.by_rank(split, 0.0).sum(3).amax(2)
    for step, layer in itertools.product(range(3), range(2)):
        row = eplb.Placement(placement.physical_to_logical[layer][None], 32)
        alone = best_split(counts[step, layer][None, None] * 1000, row, TOPOLOGY)
        assert float(TOPOLOGY.by_rank(alone, 0.0).sum(3).max()) == pytest.approx(
            1000 * float(peaks[step, layer])
        )
    balanced = rank_costs(eplb.balance_batch(counts, placement, TOPOLOGY), TOPOLOGY, 0).amax(2)
    assert (peaks <= balanced + 1e-6).all()
    assert balanced.sum() < 1.02 * peaks.sum()


def test_a_placement_without_replicas_leaves_nothing_to_split() -> None:
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    placement = eplb.Placement(torch.tensor([[3, 1, 0, 2]]), 4)
    for split in SPLITS.values():
        assert split(torch.tensor([[[1, 2, 3, 4]]]), placement, topology, 0, (0,)).tolist() == [
            [[4, 2, 1, 3]]
        ]


def test_drawn_tokens_follow_the_shares_of_the_linear_program_and_their_seed() -> None:
    counts, placement = skewed(1)
    best = best_split(counts, placement, TOPOLOGY)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    drawn = torch.cat([SPLITS["sampled"](counts, placement, TOPOLOGY, 0, (seed,)) for seed in range(400)])
    assert (np.random.get_state()[1] == states[0]).all()
    assert torch.equal(torch.get_rng_state(), states[1])
    again = SPLITS["sampled"](counts, placement, TOPOLOGY, 0, (7,))
    assert torch.equal(again[0], drawn[7])
    assert not torch.equal(drawn[7], drawn[8])
    # Five standard deviations of a mean of 400 binomial draws of up to 1024 tokens.
    assert (drawn.double().mean(0) - best[0]).abs().max() < 5 * (1024 / 4 / 400) ** 0.5
    sampled = rank_costs(drawn, TOPOLOGY, 0).amax(2).double().mean(0)
    assert (sampled > TOPOLOGY.by_rank(best, 0.0).sum(3).amax(2)[0]).all()


def test_what_cannot_be_replayed() -> None:
    with pytest.raises(
        eplb.ConfigError, match="no dispatch 'best' to replay; there are even, balanced, sampled"
    ):
        find_split("best")
    with pytest.raises(eplb.TraceError, match=r"mine: step 1, layer 0, expert 2 has 0\.5 tokens"):
        whole_counts(torch.tensor([[[1.0, 2, 3]], [[1, 2, 0.5]]]), "mine")
    assert whole_counts(torch.tensor([[[1.0, 2, 3]]]), "mine").dtype == torch.int64
    counts, placement = skewed(1)
    with pytest.raises(eplb.PlacementError, match="topology has 48"):
        best_split(counts, placement, eplb.Topology(num_ranks=8, num_slots=48))
