"""The forecast: one pass over a window that condenses it and shifts it to the expected load.

All of it is in this file, so that numba's own key of the cache suffices.
"""

from __future__ import annotations

import numpy as np

from .compiling import entry_point, jitted

__all__ = ["expect_loads"]

_LANES = 16
_LEAST_TOKENS = 1e-300  # a snapshot with fewer counts as empty: their inverse would overflow


@entry_point
def expect_loads(load, weights, bins, recency, persistence, decay, first, last, condensed):
    """Sum the snapshots of each bin, weighted, and shift them to the forecast, for layers `first..last-1`.

    A layer stays in the CPU's cache for the pass over it and the one over its bins.

    Args:
        load: float64 [snapshots, layers, logical], tokens.
        weights: float64 [snapshots].
        bins: int64 [snapshots], bin of each snapshot; each number from 0 on occurs.
        recency: weight of a snapshot relative to the next one, in the load of the moment.
        persistence: from 0, the mean of the window, to 1, the load of the moment.
        decay: weight of a snapshot relative to the next one, in the window.
        condensed: float64 [bins, layers, logical], zeros; written. A load shifted below 0 is 0.
    """
    num_snapshots, _, num_logical = load.shape
    per_token = np.empty(num_snapshots, np.float64)
    shift = np.empty(num_logical, np.float64)
    lanes = np.empty(_LANES, np.float64)
    for layer in range(first, last):
        for snapshot in range(num_snapshots):
            weight, place = weights[snapshot], bins[snapshot]
            for expert in range(num_logical):
                condensed[place, layer, expert] += weight * load[snapshot, layer, expert]
            tokens = _sum(load[snapshot, layer], lanes)
            per_token[snapshot] = 1.0 / tokens if tokens > _LEAST_TOKENS else 0.0
        _find_shift(load, layer, per_token, recency, persistence, decay, lanes, shift)
        for place in range(condensed.shape[0]):
            tokens = _sum(condensed[place, layer], lanes)
            for expert in range(num_logical):
                after = condensed[place, layer, expert] + shift[expert] * tokens
                condensed[place, layer, expert] = after if after > 0.0 else 0.0


@jitted
def _find_shift(load, layer, per_token, recency, persistence, decay, lanes, shift):
    """Write the shift of each expert's share of the tokens, float64 [logical].

    It leads from the mean of the condensed snapshots to the mean of the window. From there it goes towards
    the load of the moment, by `persistence`, less the part explained by chance (James-Stein shrinkage).
    `per_token`, float64 [snapshots], is 1 / tokens, 0 for an empty snapshot.
    """
    num_snapshots, _, num_logical = load.shape
    whole = np.empty(num_snapshots, np.float64)
    moment = np.empty(num_snapshots, np.float64)
    aged = np.empty(num_snapshots, np.float64)
    spread = _weigh(per_token, recency, moment) - _weigh(per_token, 1.0, whole)
    _weigh(per_token, decay, aged)
    change = np.zeros(num_logical, np.float64)
    noise = np.zeros(num_logical, np.float64)
    shift[:] = 0.0
    pairs = 0
    for snapshot in range(num_snapshots):
        of_shift = whole[snapshot] - aged[snapshot]
        of_change = moment[snapshot] - whole[snapshot]
        for expert in range(num_logical):
            shift[expert] += of_shift * load[snapshot, layer, expert]
            change[expert] += of_change * load[snapshot, layer, expert]
        if snapshot == 0 or per_token[snapshot] == 0.0 or per_token[snapshot - 1] == 0.0:
            continue
        here, before = per_token[snapshot], per_token[snapshot - 1]
        pairs += 1
        for expert in range(num_logical):
            step = here * load[snapshot, layer, expert] - before * load[snapshot - 1, layer, expert]
            noise[expert] += step * step
    size = 0.0
    for expert in range(num_logical):
        size += change[expert] * change[expert]
    by_chance = 0.5 * spread * _sum(noise, lanes) / max(pairs, 1)
    lasts = persistence * max(0.0, 1.0 - by_chance / size) if size > 0.0 else 0.0
    for expert in range(num_logical):
        shift[expert] += lasts * change[expert]


@jitted
def _weigh(per_token, rate, weights):
    """Write the weight of a token of each snapshot in the mean share of an expert.

    Each snapshot weighs `rate` times the next one; empty ones are left out. Weights of snapshots add up to 1.
    Returns the variance of the mean / the variance of a snapshot.
    """
    in_all, squares, one = 0.0, 0.0, 1.0
    for snapshot in range(per_token.shape[0] - 1, -1, -1):
        weights[snapshot] = 0.0
        if per_token[snapshot] > 0.0:
            in_all += one
            squares += one * one
            weights[snapshot] = one * per_token[snapshot]
        if in_all > 0.0:
            one *= rate
    if in_all == 0.0:
        return 0.0
    for snapshot in range(per_token.shape[0]):
        weights[snapshot] /= in_all
    return squares / (in_all * in_all)


@jitted
def _sum(row, lanes):
    """The sum of float64 `row` by partial sums in `lanes`: a fixed order that is also fast."""
    lanes[:] = 0.0
    whole = row.shape[0] - row.shape[0] % _LANES
    for begin in range(0, whole, _LANES):
        for lane in range(_LANES):
            lanes[lane] += row[begin + lane]
    for at in range(whole, row.shape[0]):
        lanes[at - whole] += row[at]
    total = 0.0
    for lane in range(_LANES):
        total += lanes[lane]
    return total
