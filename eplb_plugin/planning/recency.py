"""Weigh the snapshots of a window by age, and look at old ones less finely than at new ones."""

from __future__ import annotations

import torch

__all__ = ["condense"]

_BINS = 16


def condense(load: torch.Tensor, decay: float) -> torch.Tensor:
    """Weigh each snapshot by `decay` to the power of its age; sum neighbours where there are more than 16.

    What is left weighs about the same each: the older, the more snapshots are summed. That costs next to
    nothing in balance, and planning time is proportional to the number of snapshots.

    Args:
        load: float64 [snapshots, layers, logical] in time order, tokens.
        decay: weight of a snapshot relative to the next one.

    Returns:
        float64 [at most 16 snapshots, layers, logical] in time order.
    """
    num_snapshots = load.shape[0]
    # In Python floats: the bins have to be the same on every device.
    weights = [decay**age for age in range(num_snapshots)]
    weighted = load * load.new_tensor(weights[::-1])[:, None, None]
    if num_snapshots <= _BINS:
        return weighted
    share = sum(weights) / _BINS
    bins, before = [], 0.0
    for weight in weights:
        # The snapshot belongs where its middle falls.
        bins.append(min(int((before + weight / 2) / share), _BINS - 1))
        before += weight
    bins.reverse()
    starts = [at for at in range(1, num_snapshots) if bins[at] != bins[at - 1]]
    return torch.stack([part.sum(0) for part in weighted.tensor_split(starts)])
