"""The load that is expected next: the snapshots of a window, moved to another mean."""

from __future__ import annotations

import torch

from .exact import to_exact
from .kernels.api import expect_loads
from .recency import condense, weighted_bins

__all__ = ["expected_load"]

_RECENCY = 0.6  # weight of a snapshot relative to the next one, in the load of the moment
_LEAST_WEIGHT = 1e-100  # its square is above 0 too


def expected_load(load: torch.Tensor, decay: float, persistence: float) -> torch.Tensor:
    """Condense a window, and move its snapshots so that their mean is what is expected next.

    An expert's share of the tokens is expected to go from that of the moment, the last few snapshots, back to
    its mean over the window; `persistence` is how much of the difference is left while the plan is in force.
    What the difference would be by chance alone, going by how much neighbouring snapshots differ, is taken
    off its square first (James and Stein). How experts vary together around that mean is what the window
    shows: all snapshots of a layer are moved by the same shares of their tokens, and an expert that would get
    less than nothing gets nothing.

    Args:
        load: float64 [snapshots, layers, logical] in time order, tokens.
        decay: as for `condense`.
        persistence: from 0, the mean of the window, to 1, the load of the moment.

    Returns:
        float64 [at most 32 snapshots, layers, logical] in time order, each layer in a unit of its own.
    """
    if load.shape[0] == 1:
        return load
    if load.device.type == "cpu":
        return expect_loads(load, *weighted_bins(load.shape[0], decay), _RECENCY, persistence, decay)
    return _on_device(load, decay, persistence)


def _on_device(load: torch.Tensor, decay: float, persistence: float) -> torch.Tensor:
    """The same by tensor operations, none of which waits for the device."""
    # Whole numbers, since their sums do not depend on the device.
    exact = to_exact(load)
    tokens = exact.sum(2, keepdim=True)
    busy = (tokens > 0).double()
    share = exact / tokens.clamp_min(1)
    # The last column counts the snapshots that are not empty.
    columns = torch.cat([share, busy], 2)
    rates = torch.cat([share.new_full((1, 1, 1), rate) for rate in (1.0, _RECENCY, decay, _RECENCY**2)])
    sums = columns.new_zeros(4, *columns.shape[1:])
    # Empty snapshots after the last that is not do not count: many would make the weights vanish.
    goes_on = busy.flip(0).cumsum(0).flip(0) > 0
    for snapshot, ages in zip(columns.unbind(0), goes_on.unbind(0), strict=True):
        sums = sums * torch.where(ages, rates, 1.0) + snapshot
    weights = sums[:, :, -1:].clamp_min(_LEAST_WEIGHT)
    whole, moment, aged = (sums[:3, :, :-1] / weights[:3]).unbind(0)
    change = moment - whole
    spread = weights[3] / (weights[1] * weights[1]) - 1 / weights[0]
    both = busy[1:] * busy[:-1]
    step = (share[1:] - share[:-1]) * both
    noise = _sum_squares(step, (0, 2)).unsqueeze(1) / both.sum(0).clamp_min(1)
    size = _sum_squares(change, (1,)).unsqueeze(1)
    by_chance = 0.5 * spread * noise / size.clamp_min(_LEAST_WEIGHT)
    shift = whole - aged + change * ((1 - by_chance).clamp_min(0) * persistence)
    return (condense(exact, decay) + shift * condense(tokens, decay)).clamp_min(0)


def _sum_squares(share: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The sum of the squares of shares, exactly that of their multiples of 2^-36, in whatever order."""
    return (share * share * 2.0**36).round().sum(dims) / 2.0**36
