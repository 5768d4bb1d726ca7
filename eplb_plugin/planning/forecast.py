"""The load that is expected next: the snapshots of a window, moved to another mean."""

from __future__ import annotations

import torch

from .compiled import condense_loads
from .exact import to_exact
from .recency import condense, weighted_bins

__all__ = ["expected_load"]

_RECENCY = 0.6  # weight of a snapshot relative to the next one, in the load of the moment
_LEAST_WEIGHT = 1e-300


def expected_load(load: torch.Tensor, decay: float, persistence: float) -> torch.Tensor:
    """Condense a window, and move its snapshots so that their mean is what is expected next.

    An expert's share of the tokens is expected to go from that of the moment, the last few snapshots, back to
    its mean over the window; `persistence` is how much of the difference is left while the plan is in force.
    How experts vary together around that mean is what the window shows: all snapshots of a layer are moved by
    the same shares of their tokens, and an expert that would get less than nothing gets nothing.

    Args:
        load: float64 [snapshots, layers, logical] in time order, tokens.
        decay: as for `condense`.
        persistence: from 0, the mean of the window, to 1, the load of the moment.

    Returns:
        float64 [at most 32 snapshots, layers, logical] in time order, each layer in a unit of its own.
    """
    if load.shape[0] == 1:
        return load
    means = ((1.0, 1 - persistence), (_RECENCY, persistence), (decay, -1.0))
    if load.device.type == "cpu":
        return condense_loads(load, *weighted_bins(load.shape[0], decay), means)
    return _shift_on_device(load, decay, means)


def _shift_on_device(
    load: torch.Tensor, decay: float, means: tuple[tuple[float, float], ...]
) -> torch.Tensor:
    """The same by tensor operations, none of which waits for the device."""
    # Whole numbers, since their sums do not depend on the device.
    exact = to_exact(load)
    tokens = exact.sum(2, keepdim=True)
    # The last column counts the snapshots that are not empty.
    share = torch.cat([exact / tokens.clamp_min(1), (tokens > 0).double()], 2)
    rates = torch.cat([share.new_full((1, 1, 1), rate) for rate, _ in means])
    sums = share.new_zeros(len(means), *share.shape[1:])
    for snapshot in share.unbind(0):
        sums = sums * rates + snapshot
    shift = share.new_zeros(load.shape[1:])
    for (_, factor), total in zip(means, sums.unbind(0), strict=True):
        shift = shift + total[:, :-1] / total[:, -1:].clamp_min(_LEAST_WEIGHT) * factor
    return (condense(exact, decay) + shift * condense(tokens, decay)).clamp_min(0)
