"""The smooth peak: the 16-norm of the rank loads of a snapshot, summed over snapshots.

It also counts ranks that are nearly the heaviest, any of which may be the heaviest in the next step, so a
search that lowers it reaches the same balance on later traffic with about half the moves.
"""

from __future__ import annotations

import numpy as np

from .compiling import _compile_apart
from .limits import _LEAST_GAIN


@_compile_apart
def _power(x):
    """x to the power of 16, by multiplications alone: the same on every machine."""
    x = x * x
    x = x * x
    x = x * x
    return x * x


@_compile_apart
def _smooth_peak(state):
    """The 16-norm of the rank loads of each snapshot. Writes `slope` and `heat`.

    The norm is concave in the sum of powers, so a gain that is judged by the slope is at least reached.

    Returns:
        The norms and the peaks, each summed over snapshots.
    """
    load, power, unit, slope = state.load, state.power, state.unit, state.slope
    total, highest, heat = state.total, state.highest, state.heat
    num_ranks, num_snapshots = load.shape
    total[:] = np.float32(0.0)
    highest[:] = np.float32(0.0)
    for rank in range(num_ranks):
        for snapshot in range(num_snapshots):
            total[snapshot] += power[rank, snapshot]
            here = load[rank, snapshot]
            highest[snapshot] = here if here > highest[snapshot] else highest[snapshot]
    norms, peaks = 0.0, 0.0
    for snapshot in range(num_snapshots):
        slope[snapshot] = np.float32(0.0)
        if total[snapshot] > 0.0:
            norm = np.sqrt(np.sqrt(np.sqrt(np.sqrt(total[snapshot])))) / unit[snapshot]
            slope[snapshot] = norm / (np.float32(16.0) * total[snapshot])
            norms += np.float64(norm)
        peaks += np.float64(highest[snapshot])
    _project(state.powers, slope, 0, heat)
    return norms, peaks


@_compile_apart
def _project(rows, weights, begin, out):
    """The weighted sum of rows, from column `begin` on."""
    out[:] = np.float32(0.0)
    start = np.uint64(begin)  # an index that may be negative keeps a loop from being vectorised
    for row in range(weights.shape[0]):
        weight = weights[row]
        for at in range(out.shape[0]):
            out[at] += rows[row, start + np.uint64(at)] * weight


@_compile_apart
def _worth(gain, cost, price):
    """What an exchange gains beyond the price of its moves: 0 where that is not worth a round."""
    worth = gain - price * cost
    return worth if worth > _LEAST_GAIN else 0.0


@_compile_apart
def _sum(terms):
    total = np.float32(0.0)
    for at in range(terms.shape[0]):
        total += terms[at]
    return np.float64(total)
