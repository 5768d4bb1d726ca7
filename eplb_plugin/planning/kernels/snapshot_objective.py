"""The smooth peak: the 16-norm of the rank loads of a snapshot, summed over snapshots.

It also counts ranks close to the peak, any of which may be the heaviest in the next step. A search that
lowers it reaches the same balancedness on later traffic with about half the moves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import jitted

__all__ = [
    "LEAST_GAIN",
    "NEVER",
    "ROUNDING",
    "SPREAD",
    "ExchangeTerms",
    "net_gain",
    "power_16",
    "smooth_peak",
    "sum_terms",
    "weighted_sum",
]

LEAST_GAIN = 2e-4  # as a fraction of the mean rank load; smaller gains are not worth a round
SPREAD = 0.1  # measured: more helps where few experts are very hot, and costs elsewhere
ROUNDING = np.float32(1.0001)  # raises upper bounds by more than sums of float32 may be too low
NEVER = np.float32(1e18)  # moves of an exchange that is not allowed


class ExchangeTerms(NamedTuple):
    """What exchanges of a layer are judged by, as fractions of the mean rank load."""

    price: float  # of one move
    least_gain: float  # an exchange with a lower net gain is not made
    spread: float  # a replica counts as load * (1 / n + spread / n**2), for n replicas
    factor: float  # on the price of moves, 1 where traffic drifts; in `price` already


@jitted
def power_16(x):
    """x ** 16 by multiplications alone, for equal results on every machine."""
    x = x * x
    x = x * x
    x = x * x
    return x * x


@jitted
def smooth_peak(state):
    """The norms and the peaks, each summed over snapshots; writes `slope` and `weight`.

    The norm is concave in the sum of powers, so the actual gain is at least the one that `slope` predicts.
    """
    load, power, unit, slope = state.load, state.power, state.unit, state.slope
    total, highest = state.total, state.highest
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
    weighted_sum(state.powers, slope, 0, state.weight)
    return norms, peaks


@jitted
def weighted_sum(rows, weights, begin, out):
    """Write the weighted sum of `rows`, from column `begin` on, to `out`."""
    out[:] = np.float32(0.0)
    start = np.uint64(begin)  # a loop is not vectorised where an index may be negative
    num_rows = weights.shape[0]
    whole = num_rows - num_rows % 4
    # Four rows at once, in their order: `out` is read and written a quarter as often.
    for row in range(0, whole, 4):
        one, two, three, four = weights[row], weights[row + 1], weights[row + 2], weights[row + 3]
        for at in range(out.shape[0]):
            column = start + np.uint64(at)
            total = out[at] + rows[row, column] * one
            total += rows[row + 1, column] * two
            total += rows[row + 2, column] * three
            out[at] = total + rows[row + 3, column] * four
    for row in range(whole, num_rows):
        weight = weights[row]
        for at in range(out.shape[0]):
            out[at] += rows[row, start + np.uint64(at)] * weight


@jitted
def net_gain(gain, moves, price, least_gain):
    """Gain of an exchange minus the price of its moves; 0 where that is below the least gain."""
    net = gain - price * moves
    return net if net > least_gain else 0.0


@jitted
def sum_terms(terms):
    total = np.float32(0.0)
    for at in range(terms.shape[0]):
        total += terms[at]
    return np.float64(total)
