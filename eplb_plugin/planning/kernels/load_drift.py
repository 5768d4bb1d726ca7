"""Drift: how far the loads of ranks change within a window, and the price of moves that follows from it.

The gain of a move lasts as long as the load that it was made for. Steady traffic keeps it for many intervals,
so a move may cost less there.
"""

from __future__ import annotations

import numpy as np

from .compiling import jitted

__all__ = ["price_factor"]

# Measured, as fractions of the mean rank load: from this drift or this noise on, a gain lasts for about one
# interval, or is not sure to be one.
_DRIFTING = 0.04
_NOISY = 0.018


@jitted
def price_factor(whole, older, even, num_ranks, least):
    """The factor on the price of a move, from `least` where traffic is steady to 1 where it drifts.

    Drift is the root mean square change of a rank load between the older and the newer half of the window. It
    is a fraction of the mean rank load. Ranks are taken to hold independent experts without replicas, so no
    placement changes it. Noise is the same for even and odd snapshots, between which nothing drifts. The
    variance of the noise is part of the change from half to half, and is subtracted from it.

    Args:
        whole, older, even: float64 [logical], load of all snapshots, of the older half of them, and of the
            even-numbered ones.
    """
    change = num_ranks * _squared_change(whole, older)
    noise = num_ranks * _squared_change(whole, even)
    if not (change < np.inf and noise < np.inf):
        return 1.0
    drift = np.sqrt(max(0.0, change - noise))
    return min(1.0, max(least, drift / _DRIFTING, noise / _NOISY**2))


@jitted
def _squared_change(whole, part):
    """Squared change of the shares of experts from one part of a window to the rest, summed; infinite where
    either is empty."""
    first, second = 0.0, 0.0
    for expert in range(whole.shape[0]):
        first += part[expert]
        second += whole[expert] - part[expert]
    if not (first > 0.0 and second > 0.0):
        return np.inf
    squares = 0.0
    for expert in range(whole.shape[0]):
        change = (whole[expert] - part[expert]) / second - part[expert] / first
        squares += change * change
    return squares
