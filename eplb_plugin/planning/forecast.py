"""The load that is expected next: the snapshots of a window, moved to another mean."""

from __future__ import annotations

import torch

from .compiled import shift_loads
from .exact import to_exact
from .recency import condense

__all__ = ["expected_load"]

_RECENCY = 0.6  # weight of a snapshot relative to the next one, in the load of the moment


def expected_load(load: torch.Tensor, decay: float, persistence: float) -> torch.Tensor:
    """Condense a window, and move its snapshots so that their mean is the load expected next.

    An expert's share of the tokens is expected to go from that of the moment (the last few snapshots) back
    to its mean over the window, and `persistence` says how much of the difference is left, on the mean, in
    the time that is planned for. How experts vary together around that is taken from the window: all of its
    snapshots are moved by the same shares. A share that would be negative is 0.

    Args:
        load: float64 [snapshots, layers, logical] in time order, tokens.
        decay: as for `condense`.
        persistence: between 0, the mean of the window, and 1, the load of the moment; see
            `PlannerOptions.persistence`.

    Returns:
        float64 [at most 32 snapshots, layers, logical] in time order. Each layer may be scaled by a power of two.
    """
    if load.shape[0] == 1:
        return load
    if load.device.type == "cpu":
        parts = ((1.0, 1 - persistence), (_RECENCY, persistence), (decay, -1.0))
        return shift_loads(load, condense(load, decay), parts)
    # Whole numbers, since their sums do not depend on the device.
    exact = to_exact(load)
    tokens = exact.sum(2, keepdim=True)
    share = torch.cat([exact / tokens.clamp_min(1), (tokens > 0).double()], 2)
    rates = torch.cat([share.new_full((1, 1, 1), rate) for rate in (1.0, _RECENCY, decay)])
    sums = share.new_zeros(3, *share.shape[1:])
    for snapshot in share.unbind(0):
        sums = sums * rates + snapshot
    mean, moment, condensed_mean = sums[:, :, :-1] / sums[:, :, -1:].clamp_min(1e-300)
    shift = mean * (1 - persistence) + moment * persistence - condensed_mean
    return (condense(exact, decay) + shift * condense(tokens, decay)).clamp_min(0)
