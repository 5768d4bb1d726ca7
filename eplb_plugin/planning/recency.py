"""Weigh the snapshots of a window by age, and look at old ones less finely than at new ones."""

from __future__ import annotations

import torch

__all__ = ["condense", "weighted_bins"]

_BINS = 32


def condense(load: torch.Tensor, decay: float) -> torch.Tensor:
    """Weigh each snapshot by `decay` to the power of its age; sum neighbours where there are more than 32.

    What is left weighs about the same each: the older, the more snapshots are summed. That costs next to
    nothing in balance, and planning time is proportional to the number of snapshots.

    Args:
        load: float64 [snapshots, layers, logical] in time order, tokens.
        decay: weight of a snapshot relative to the next one.

    Returns:
        float64 [at most 32 snapshots, layers, logical] in time order.
    """
    if load.shape[0] == 1:
        return load
    weights, bins = weighted_bins(load.shape[0], decay)
    # Weight by weight, since copying them to a GPU would wait for it. (On the CPU, a compiled pass of
    # `forecast` does this and more.)
    condensed = load.new_zeros(max(bins) + 1, *load.shape[1:])
    for snapshot, (weight, name) in enumerate(zip(weights, bins, strict=True)):
        condensed[name].add_(load[snapshot] * weight)
    return condensed


def weighted_bins(num_snapshots: int, decay: float) -> tuple[list[float], list[int]]:
    """The weight of each snapshot and the number of the one that it is summed to, both in time order."""
    # In Python floats: the bins have to be the same on every device.
    weights = [decay**age for age in range(num_snapshots)]
    bins = list(range(num_snapshots))
    if num_snapshots > _BINS:
        share, before = sum(weights) / _BINS, 0.0
        for age, weight in enumerate(weights):
            # The snapshot belongs where its middle falls.
            bins[age] = min(int((before + weight / 2) / share), _BINS - 1)
            before += weight
    # Numbered in time order, without gaps.
    names = {name: number for number, name in enumerate(sorted(set(bins), reverse=True))}
    return weights[::-1], [names[name] for name in reversed(bins)]
