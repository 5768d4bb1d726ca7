"""Folding vLLM's sliding windows, against loops over every entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_plugin.integration.vllm.window import (
    fold_window,
    no_samples,
    no_window,
    sample_window,
    sum_over_ranks,
)


def by_loops(window, ids, num_logical, position, steps, snapshots):
    """The oracle: step by step, slot by slot."""
    ring = window.shape[0]
    steps = min(steps, ring)
    snapshots = min(snapshots, steps)
    out = torch.zeros(snapshots, window.shape[1], num_logical, dtype=torch.int64)
    for age in range(steps):  # 0 is the newest
        step = (position - 1 - age) % ring
        snapshot = (steps - 1 - age) * snapshots // steps
        for layer in range(ids.shape[0]):
            for slot, expert in enumerate(ids[layer].tolist()):
                if expert >= 0:
                    out[snapshot, layer, expert] += int(window[step, layer, slot])
    return out


@settings(deadline=None, max_examples=60)
@given(
    ring=st.integers(1, 9),
    steps=st.integers(1, 12),
    snapshots=st.integers(1, 6),
    position=st.integers(0, 8),
    unused=st.booleans(),
    seed=st.integers(0, 999),
)
def test_folding_is_what_loops_say(ring, steps, snapshots, position, unused, seed):
    generator = torch.Generator().manual_seed(seed)
    window = torch.randint(0, 50, (ring, 2, 6), generator=generator, dtype=torch.int32)
    ids = torch.stack([torch.randperm(6, generator=generator) % 4 for _ in range(2)])
    if unused:
        ids[:, 3] = -1
    given_window, given_ids = window.clone(), ids.clone()
    folded = fold_window(window, ids, 4, position=position % ring, steps=steps, snapshots=snapshots)
    assert folded.dtype == torch.int64
    assert torch.equal(folded, by_loops(window, ids, 4, position % ring, steps, snapshots))
    assert torch.equal(window, given_window)
    assert torch.equal(ids, given_ids)


@settings(deadline=None, max_examples=40)
@given(
    ring=st.integers(1, 9),
    steps=st.integers(1, 12),
    samples=st.integers(0, 5),
    position=st.integers(0, 8),
    seed=st.integers(0, 999),
)
def test_samples_are_single_steps_evenly_spaced(ring, steps, samples, position, seed):
    generator = torch.Generator().manual_seed(seed)
    window = torch.randint(0, 50, (ring, 2, 6), generator=generator, dtype=torch.int32)
    ids = torch.stack([torch.randperm(6, generator=generator) % 4 for _ in range(2)])
    size = {"steps": steps, "samples": samples}
    sampled = sample_window(window, ids, 4, position=position % ring, **size)
    steps = min(steps, ring)
    # As many snapshots as steps are the single steps.
    single = by_loops(window, ids, 4, position % ring, steps, steps)
    count = min(samples, steps)
    assert torch.equal(sampled, single[[n * steps // count for n in range(count)]])
    assert no_samples(window, 4, **size).shape == sampled.shape


def test_ranks_whose_rings_stand_elsewhere_meet_by_age():
    """An idle rank does not advance: the same steps, written at other positions, give the same snapshots."""
    steps = torch.arange(1, 5, dtype=torch.int32).view(4, 1, 1).expand(4, 1, 2)
    ids = torch.tensor([[0, 1]])
    folded = [
        fold_window(steps.roll(shift, 0), ids, 2, position=shift, steps=4, snapshots=2) for shift in range(4)
    ]
    assert all(torch.equal(one, folded[0]) for one in folded)
    assert folded[0][:, 0, 0].tolist() == [1 + 2, 3 + 4]


def test_large_counts_do_not_overflow():
    window = torch.full((8, 1, 2), 2**31 - 1, dtype=torch.int32)
    folded = fold_window(window, torch.tensor([[0, 0]]), 1, position=0, steps=8, snapshots=1)
    assert int(folded) == 16 * (2**31 - 1)


@pytest.mark.parametrize("shapes", [[(2, 3, 4)], [(2, 3, 4), (1, 2, 5)]])
def test_all_models_are_summed_in_one_reduction(shapes):
    loads = [torch.arange(torch.Size(shape).numel()).view(shape) for shape in shapes]
    calls = []

    def all_reduce(tensor):
        calls.append(tensor.shape)
        tensor.mul_(3)

    summed, failures = sum_over_ranks(loads, True, all_reduce)
    assert failures.tolist() == [3]
    assert len(calls) == 1
    assert all(torch.equal(total, load * 3) for total, load in zip(summed, loads, strict=True))
    assert all(total.shape == load.shape for total, load in zip(summed, loads, strict=True))


@pytest.mark.parametrize(("ring", "steps", "snapshots"), [(8, 4, 3), (2, 4, 3), (8, 2, 3)])
def test_a_rank_that_cannot_fold_has_zeros_of_the_same_shape(ring, steps, snapshots):
    window = torch.ones(ring, 2, 4, dtype=torch.int32)
    folded = fold_window(
        window, torch.tensor([0, 1, 2, 0]).expand(2, 4), 3, position=0, steps=steps, snapshots=snapshots
    )
    zeros = no_window(window, 3, steps=steps, snapshots=snapshots)
    assert torch.equal(zeros, torch.zeros_like(folded))
