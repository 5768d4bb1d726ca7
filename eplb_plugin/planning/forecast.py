"""The load to expect next: the snapshots of a window, weighted by age and shifted to another mean."""

from __future__ import annotations

import torch

from .kernels.api import expect_loads

__all__ = ["expected_load", "weighted_bins"]

_RECENCY = 0.6  # weight of a snapshot relative to the next one, in the load of the moment
_BINS = 32


def expected_load(load: torch.Tensor, decay: float, persistence: float) -> torch.Tensor:
    """Condense a window, and shift its snapshots to the mean that is expected next.

    The load of the moment is the mean of the last few snapshots. An expert's share of the tokens is expected
    to fall back from it to the mean of the window. `persistence` is the fraction of the difference that
    remains while the plan is in force. The difference is first shrunk by its noise, estimated from the
    differences of neighbouring snapshots (James and Stein). All snapshots of a layer get the same shift of
    their shares, so that experts vary together as they did in the window. Negative loads become 0.

    Args:
        load: float64 [snapshots, layers, logical] on the CPU, in time order, tokens.
        decay: weight of a snapshot relative to the next one.
        persistence: 0 expects the mean of the window, 1 the load of the moment.

    Returns:
        float64 [at most 32 snapshots, layers, logical] in time order, tokens; a single snapshot unchanged.
    """
    if load.shape[0] == 1:
        return load
    return expect_loads(load, *weighted_bins(load.shape[0], decay), _RECENCY, persistence, decay)


def weighted_bins(num_snapshots: int, decay: float) -> tuple[list[float], list[int]]:
    """Sum neighbouring snapshots into at most 32 bins of about equal weight: older bins take more snapshots.

    Planning time is proportional to the number of bins. Of 64 snapshots without decay, each bin sums two.

    Returns:
        The weight of each snapshot, `decay` to the power of its age; and its bin, both in time order.
    """
    # Python floats, so that the bins are the same on every device.
    weights = [decay**age for age in range(num_snapshots)]
    bins = list(range(num_snapshots))
    if num_snapshots > _BINS:
        share, before = sum(weights) / _BINS, 0.0
        for age, weight in enumerate(weights):
            # A snapshot belongs to the bin of its middle.
            bins[age] = min(int((before + weight / 2) / share), _BINS - 1)
            before += weight
    # Numbered in time order, without gaps.
    names = {name: number for number, name in enumerate(sorted(set(bins), reverse=True))}
    return weights[::-1], [names[name] for name in reversed(bins)]
