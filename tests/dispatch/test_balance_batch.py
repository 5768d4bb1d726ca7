"""`balance_batch`: sums, peaks, and the split of an obvious oracle, token by token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.dispatch.split_kernels import FINE_SWEEPS, SHIFT
from tests.dispatch.cases import best_peak, worse_by_sweeps, worse_with_two_on_a_rank
from tests.runtime.cases import random_placement

COSTS = (0, 1, 8, 30)


def rank_costs(tokens: Sequence[int], topology: eplb.Topology, expert_cost: int) -> list[int]:
    """The cost of each rank, from the tokens of all slots."""
    costs = [max(n, expert_cost) if n else 0 for n in tokens]
    return [sum(costs[topology.slots_of_rank(rank)]) for rank in range(topology.num_ranks)]


def even_split(count: int, replicas: int) -> list[int]:
    return [count // replicas + (r < count % replicas) for r in range(replicas)]


def pour(count: int, base: Sequence[int], expert_cost: int) -> list[int]:
    """Units for ranks of `base` with the lowest peak, on the fewest ranks.

    Every subset of ranks is tried. Within one, each rank in use costs at least `expert_cost`, and each unit
    goes to the rank with the fewest units and base, of equal ones to the earlier in the order of base.
    """
    order = sorted(range(len(base)), key=lambda rank: base[rank])
    best = None
    for size in range(1, len(base) + 1):
        for subset in itertools.combinations(range(len(base)), size):
            ranks = [order[at] for at in subset]
            # Unit by unit ends at the last level whose room is not above the count; the rest goes one higher.
            level = base[ranks[0]]
            while sum(max(0, level + 1 - base[rank]) for rank in ranks) <= count:
                level += 1
            filled = {rank: max(0, level - base[rank]) for rank in ranks}
            rest = count - sum(filled.values())
            for rank in [rank for rank in ranks if base[rank] <= level][:rest]:
                filled[rank] += 1
            assert sum(filled.values()) == count
            peak = max(base[rank] + max(n, expert_cost) for rank, n in filled.items())
            if best is None or (peak, size, subset) < best[0]:
                best = (peak, size, subset), filled
    assert best is not None
    return [best[1].get(rank, 0) for rank in range(len(base))]


def slow_split(counts: list[int], slots: list[int], topology: eplb.Topology, expert_cost: int) -> list[int]:
    """The split of one layer: even, then `pour` for one replicated expert after the other, in parts of tokens
    and at last in tokens; even again if that is lower, with the tokens of a rank in its first replica."""
    unit = 2**SHIFT
    rank_of = [rank for rank in range(topology.num_ranks) for _ in range(topology.slots_by_rank[rank])]
    tokens = [0] * len(slots)
    replicas = {e: [s for s, held in enumerate(slots) if held == e] for e in range(len(counts))}
    for expert, where in replicas.items():
        for slot, part in zip(where, even_split(counts[expert], len(where)), strict=True):
            tokens[slot] = unit * part
    even = list(tokens)
    for sweep in range(FINE_SWEEPS + 1):
        in_tokens = sweep == FINE_SWEEPS
        for expert, where in replicas.items():
            if len(where) == 1 or not counts[expert]:
                continue
            firsts = [s for s in where if all(rank_of[s] != rank_of[t] for t in where if t < s)]
            with_it = rank_costs(tokens, topology, unit * expert_cost)
            for slot in where:
                tokens[slot] = 0
            costs = rank_costs(tokens, topology, unit * expert_cost)
            base = [costs[rank_of[slot]] for slot in firsts]
            if in_tokens:
                poured = pour(counts[expert], [(b + unit // 2) // unit for b in base], expert_cost)
                poured = [unit * part for part in poured]
            else:
                relaxed = [b + with_it[rank_of[slot]] // 2 for b, slot in zip(base, firsts, strict=True)]
                poured = pour(unit * counts[expert], relaxed, unit * expert_cost)
            for slot, part in zip(firsts, poured, strict=True):
                tokens[slot] = part
    if max(rank_costs(tokens, topology, unit * expert_cost)) > max(
        rank_costs(even, topology, unit * expert_cost)
    ):
        tokens = [0] * len(slots)
        for slot, part in enumerate(even):
            on_rank = (other for other in replicas[slots[slot]] if rank_of[other] == rank_of[slot])
            tokens[next(on_rank)] += part
    return [part // unit for part in tokens]


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, eplb.Placement, eplb.Topology]:
    """Counts [layers, logical], and a placement on a few ranks, even or not."""
    logical = draw(st.integers(1, 5))
    ranks = draw(st.integers(1, 4))
    by_rank = [draw(st.integers(0, 3)) for _ in range(ranks)]
    by_rank[0] += max(0, logical - sum(by_rank))
    topology = eplb.Topology(num_ranks=ranks, num_slots=sum(by_rank), rank_slots=tuple(by_rank))
    placement = random_placement(2, logical, topology.num_slots, draw(st.integers(0, 2**31)))
    high = draw(st.sampled_from([3, 12, 40]))
    counts = draw(st.lists(st.integers(0, high), min_size=2 * logical, max_size=2 * logical))
    return torch.tensor(counts).view(2, logical), placement, topology


@settings(max_examples=200, deadline=None)
@given(batch=batches(), expert_cost=st.sampled_from(COSTS))
def test_the_split_is_that_of_slow_water_filling(
    batch: tuple[torch.Tensor, eplb.Placement, eplb.Topology], expert_cost: int
) -> None:
    counts, placement, topology = batch
    tokens = eplb.balance_batch(counts, placement, topology, expert_cost=expert_cost)
    for layer in range(2):
        slots = placement.physical_to_logical[layer].tolist()
        wanted = slow_split(counts[layer].tolist(), slots, topology, expert_cost)
        assert tokens[layer].tolist() == wanted


@settings(max_examples=100, deadline=None)
@given(batch=batches(), expert_cost=st.sampled_from(COSTS))
def test_no_token_is_lost_and_no_peak_is_above_the_even_splits(
    batch: tuple[torch.Tensor, eplb.Placement, eplb.Topology], expert_cost: int
) -> None:
    counts, placement, topology = batch
    tokens = eplb.balance_batch(counts, placement, topology, expert_cost=expert_cost)
    assert tokens.min() >= 0
    for layer in range(2):
        slots = placement.physical_to_logical[layer]
        even = [0] * len(slots)
        for expert, count in enumerate(counts[layer].tolist()):
            where = (slots == expert).nonzero()[:, 0].tolist()
            assert int(tokens[layer, where].sum()) == count
            for slot, part in zip(where, even_split(count, len(where)), strict=True):
                even[slot] = part
        peak = max(rank_costs(tokens[layer].tolist(), topology, expert_cost))
        assert peak <= max(rank_costs(even, topology, expert_cost))


def test_sweeps_that_end_above_the_even_split_are_dropped() -> None:
    """With a cost of 4, they end with 13 on the slowest rank."""
    counts, placement, topology = worse_by_sweeps()
    tokens = eplb.balance_batch(counts[None], placement, topology, expert_cost=4)
    assert tokens.tolist() == [[7, 3, 6, 3, 8, 3]]
    assert max(rank_costs(tokens[0].tolist(), topology, 4)) == 12


def test_an_even_split_leaves_no_tokens_in_the_second_replica_on_a_rank() -> None:
    counts, placement, topology = worse_with_two_on_a_rank()
    tokens = eplb.balance_batch(counts[None], placement, topology, expert_cost=8)
    assert tokens.tolist() == [[9, 9, 17, 33, 0, 8, 26, 8, 8]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), expert_cost=st.sampled_from(COSTS))
def test_one_replicated_expert_is_split_at_best(seed: int, expert_cost: int) -> None:
    """By brute force over all its splits."""
    draw = np.random.default_rng(seed)
    placement = eplb.Placement(torch.tensor([[0, 1, 2, 0, 3, 0]]), 4)
    topology = eplb.Topology(num_ranks=3, num_slots=6)
    counts = draw.integers(0, 16, 4)
    _, b, c, d = counts.tolist()
    n = int(counts[0])
    tokens = eplb.balance_batch(torch.from_numpy(counts)[None], placement, topology, expert_cost=expert_cost)
    peaks = [
        max(rank_costs([x, b, c, y, d, n - x - y], topology, expert_cost))
        for x in range(n + 1)
        for y in range(n + 1 - x)
    ]
    assert max(rank_costs(tokens[0].tolist(), topology, expert_cost)) == min(peaks)


def test_the_peak_is_within_a_hundredth_of_the_linear_programs() -> None:
    draw, ratios = np.random.default_rng(7), []
    while len(ratios) < 25:
        load = draw.lognormal(0, 1, 32)
        topology = eplb.Topology(num_ranks=8, num_slots=40)
        placement = eplb.plan(torch.from_numpy(load)[None], topology).placement
        counts = draw.poisson(load / load.sum() * 1024)
        slots = placement.physical_to_logical[0].numpy()
        best = best_peak(counts, slots, topology)
        even = counts / np.bincount(slots)
        if even[slots].reshape(8, 5).sum(1).max() < 1.04 * best:
            continue  # nothing to gain
        tokens = eplb.balance_batch(torch.from_numpy(counts)[None], placement, topology)
        ratios.append(max(rank_costs(tokens[0].tolist(), topology, 0)) / best)
    assert np.mean(ratios) < 1.01


def test_empty_slots_and_second_replicas_on_a_rank_get_nothing() -> None:
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    placement = eplb.Placement(torch.tensor([[0, 1, -1, 0]]), 2)
    assert eplb.balance_batch(torch.tensor([[7, 4]]), placement, topology).tolist() == [[1, 4, 0, 6]]
    placement = eplb.Placement(torch.tensor([[0, 0, 1, 0]]), 2)
    assert eplb.balance_batch(torch.tensor([[9, 1]]), placement, topology).tolist() == [[5, 0, 1, 4]]


def test_few_tokens_go_to_one_replica_and_many_to_several() -> None:
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    placement = eplb.Placement(torch.tensor([[0, 1, 2, 0]]), 3)
    few = eplb.balance_batch(torch.tensor([[20, 40, 10]]), placement, topology, expert_cost=32)
    assert few.tolist() == [[0, 40, 10, 20]]
    many = eplb.balance_batch(torch.tensor([[200, 40, 10]]), placement, topology, expert_cost=32)
    assert many.tolist() == [[96, 40, 10, 104]]


def test_steps_shapes_dtypes_and_strides_make_no_difference() -> None:
    topology = eplb.Topology(num_ranks=4, num_slots=12)
    placement = random_placement(3, 7, 12, 5)
    counts = torch.randint(0, 100, (6, 3, 7), generator=torch.Generator().manual_seed(0))
    tokens = eplb.balance_batch(counts, placement, topology)
    assert tokens.shape == (6, 3, 12)
    assert tokens.dtype == torch.int64
    for step in range(6):
        assert torch.equal(
            eplb.balance_batch(counts[step].to(torch.int32), placement, topology), tokens[step]
        )
    turned = counts.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(eplb.balance_batch(turned.to(torch.uint8), placement, topology), tokens)
    assert eplb.balance_batch(counts[:0], placement, topology).shape == (0, 3, 12)


def test_what_does_not_fit_is_refused() -> None:
    topology = eplb.Topology(num_ranks=4, num_slots=12)
    placement = random_placement(3, 7, 12, 5)
    good = torch.ones(3, 7, dtype=torch.int64)
    bad = good.clone()
    bad[1, 2] = -3
    for counts, told in (
        (good.double(), "torch.float64, not a tensor of integers"),
        (good.bool(), "torch.bool, not a tensor of integers"),
        (good.tolist(), "list, not a tensor of integers"),
        (good[:2], r"shape \(2, 7\); the placement has 3 layers of 7 experts"),
        (good[None, None], r"shape \(1, 1, 3, 7\)"),
        (bad, r"step 0, layer 1, expert 2 is -3, outside 0\.\."),
        (good << 41, "outside 0"),
    ):
        with pytest.raises(eplb.LoadError, match=told):
            eplb.balance_batch(counts, placement, topology)  # type: ignore[arg-type]
    for cost, told in (
        (-1, "expert_cost=-1 is below 0"),
        (float("nan"), "expert_cost=nan is not an integer"),
    ):
        with pytest.raises(eplb.LoadError, match=told):
            eplb.balance_batch(good, placement, topology, expert_cost=cost)  # type: ignore[arg-type]
    with pytest.raises(eplb.PlacementError, match="12 slots"):
        eplb.balance_batch(good, placement, eplb.Topology(num_ranks=2, num_slots=14))
