"""The search of one layer for balanced dispatch: exchanges that lower the smooth peak after the split.

A round prices all exchanges of the heavy ranks to first order, and fills the experts of the best ones anew.
In that order they are tried: each sample is split again, from the split that it has. The first exchange that
earns the price of its moves is made. A search ends when none of the tried ones does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import SOURCES, copy_into, entry_point, jitted
from .split_exchanges import (
    Candidates,
    choose_candidates,
    local_gain,
    make_exchange,
    new_prices,
    price_ranks,
)
from .split_state import list_slots, new_state, settle, split_evenly

__all__ = ["SplitProblem", "improve_splits", "peaks_after_split"]

_HEAVY_RANKS = 8  # ranks whose slots a round considers
_CANDIDATES = 64  # exchanges of a round that are filled anew
_TRIED = 8  # exchanges of a round that are split anew, at most
_STRIDE = 2  # pricing takes every second sample
_RELAXED_SWEEPS, _SWEEPS = 6, 1  # of the first split
_SWEEPS_AGAIN = 2  # after an exchange
_LEAST_GAIN = 1e-5  # of the smooth peak, as a fraction of the mean rank load
_TOLERANCE = 5e-4  # the search ends this close to level ranks


class SplitProblem(NamedTuple):
    """Layers to improve for balanced dispatch."""

    samples: np.ndarray  # float64 [samples, layers, logical], tokens
    current: np.ndarray  # int64 [layers, slots], the placement that moves are counted from, -1 for empty
    starts: np.ndarray  # int64 [starts, layers, slots], placements to start from; the best one is improved
    rank_of: np.ndarray  # int64 [slots]
    num_ranks: int
    ranks_per_node: int
    price: float  # of a move, as a fraction of the mean rank load
    max_moves: int  # most moves of a layer away from `current`
    rounds: int  # most exchanges of a layer


@jitted
def _scaled(samples, layer, num_ranks, scaled):
    """Write the samples of a layer, each with a mean rank load of 1."""
    for sample in range(samples.shape[0]):
        total = 0.0
        for expert in range(samples.shape[2]):
            total += samples[sample, layer, expert]
        scale = num_ranks / total if total > 0.0 else 0.0
        for expert in range(samples.shape[2]):
            scaled[sample, expert] = samples[sample, layer, expert] * scale


@jitted
def _split_all(state):
    """Split every sample from the even split. Returns the mean norm."""
    split_evenly(state)
    total = 0.0
    for sample in range(state.samples.shape[0]):
        given, load = state.given[sample], state.load[sample]
        norm = settle(state, state.samples[sample], given, load, _RELAXED_SWEEPS, _SWEEPS)
        state.norm[sample] = norm
        total += norm
    return total / state.samples.shape[0]


@jitted
def _moves(state):
    """Moves of the placement."""
    moves = 0
    for rank in range(state.held.shape[0]):
        for expert in range(state.held.shape[1]):
            if state.held[rank, expert] > 0:
                moves += state.fee[rank, expert]
    return moves


@jitted
def _try_exchange(state, mine, other, is_copy, limit, given, load, norms):
    """Make an exchange, and split all samples anew into `given`, `load` and `norms`.

    Returns whether the mean norm is below `limit`. It gives up halfway where the gain of the first half of
    the samples is not a quarter of what is needed. The exchange is undone where it fails.
    """
    rank_of, num_samples = state.rank_of, state.samples.shape[0]
    x, y = state.expert[mine], state.expert[other]
    # Where the tokens of the other expert go until they are filled anew, if it loses a replica.
    remaining = -1
    for slot in state.slots[state.first[y] : state.first[y + 1]]:
        if slot != other and remaining < 0:
            remaining = slot
    make_exchange(state, mine, other, is_copy)
    list_slots(state.expert, state.slots, state.first)
    total, before = 0.0, 0.0
    for number in range(num_samples):
        # Even samples first: both halves cover the whole time.
        sample = 2 * number if 2 * number < num_samples else 2 * (number - (num_samples + 1) // 2) + 1
        row, loads = given[sample], load[sample]
        copy_into(row, state.given[sample])
        copy_into(loads, state.load[sample])
        here = row[other]
        loads[rank_of[other]] -= here
        if is_copy:
            row[other] = 0.0
            row[remaining] += here
            loads[rank_of[remaining]] += here
        else:
            there = row[mine]
            row[other], row[mine] = there, here
            loads[rank_of[other]] += there
            loads[rank_of[mine]] += here - there
        norms[sample] = settle(state, state.samples[sample], row, loads, 0, _SWEEPS_AGAIN)
        total += norms[sample]
        before += state.norm[sample]
        if 2 * (number + 1) == num_samples and total > before:
            break
    else:
        if total / num_samples < limit:
            return True
    # Undo: the exchange of the same slots, or the old expert.
    if is_copy:
        state.held[rank_of[other], x] -= 1
        state.held[rank_of[other], y] += 1
        state.expert[other] = y
    else:
        make_exchange(state, mine, other, False)
    list_slots(state.expert, state.slots, state.first)
    return False


@jitted
def _keep(state, given, load, norms):
    """Take over the splits of an exchange. Returns the mean norm."""
    total = 0.0
    for sample in range(norms.shape[0]):
        copy_into(state.given[sample], given[sample])
        copy_into(state.load[sample], load[sample])
        state.norm[sample] = norms[sample]
        total += norms[sample]
    return total / norms.shape[0]


@jitted
def _improve(problem, state, norm, most_slots):
    """Make exchanges until none earns its price. `norm`: the mean norm at the start."""
    num_samples, num_slots, num_ranks = state.samples.shape[0], state.expert.shape[0], state.load.shape[1]
    prices = new_prices(num_slots, num_ranks, min(_HEAVY_RANKS, num_ranks), most_slots)
    candidates = Candidates(
        gain=np.zeros(_CANDIDATES), mine=np.zeros(_CANDIDATES, np.int64),
        other=np.zeros(_CANDIDATES, np.int64), is_copy=np.zeros(_CANDIDATES, np.bool_),
        moves=np.zeros(_CANDIDATES, np.int64),
    )  # fmt: skip
    worth = np.zeros(_CANDIDATES)
    lists = np.zeros((2, num_slots), np.int64)
    row, loads = np.zeros(num_slots), np.zeros(num_ranks)
    given, load, norms = np.zeros_like(state.given), np.zeros_like(state.load), np.zeros(num_samples)
    priced = (num_samples + _STRIDE - 1) // _STRIDE
    level = np.float64(num_ranks) ** (1.0 / 16.0)
    moves = _moves(state)
    for _ in range(problem.rounds):
        if norm <= level * (1.0 + _TOLERANCE):
            break
        number = price_ranks(state, prices, _STRIDE)
        left = problem.max_moves - moves
        found = choose_candidates(state, prices, number, problem.price * priced, left, candidates)
        for at in range(found):
            worth[at] = local_gain(
                state, candidates.mine[at], candidates.other[at], candidates.is_copy[at], _STRIDE, lists,
                loads, row,
            ) - problem.price * candidates.moves[at]  # fmt: skip
        improved = False
        for _try in range(min(found, _TRIED)):
            best = 0
            for at in range(found):
                if worth[at] > worth[best]:
                    best = at
            worth[best] = -np.inf
            limit = norm - problem.price * candidates.moves[best] - _LEAST_GAIN
            mine, other, is_copy = candidates.mine[best], candidates.other[best], candidates.is_copy[best]
            if _try_exchange(state, mine, other, is_copy, limit, given, load, norms):
                norm = _keep(state, given, load, norms)
                moves += candidates.moves[best]
                improved = True
                break
        if not improved:
            break


def _build(sources):
    @entry_point
    def improve_splits(problem, first, last, slot_expert):
        """Improve layers `first..last-1`, writing `slot_expert`, int64 [layers, slots]."""
        _ = sources  # numba adds values of the closure to the key of the cache
        rank_of, num_ranks, per_node = problem.rank_of, problem.num_ranks, problem.ranks_per_node
        most_slots, run = 0, 0
        for slot in range(rank_of.shape[0]):
            run = run + 1 if slot > 0 and rank_of[slot] == rank_of[slot - 1] else 1
            most_slots = max(most_slots, run)
        for layer in range(first, last):
            samples = np.empty((problem.samples.shape[0], problem.samples.shape[2]))
            _scaled(problem.samples, layer, num_ranks, samples)
            ids = problem.starts[0, layer].copy()
            best = new_state(samples, ids, rank_of, num_ranks, per_node, problem.current[layer])
            best_norm = _split_all(best)
            for start in range(1, problem.starts.shape[0]):
                ids = problem.starts[start, layer].copy()
                if (ids == best.expert).all():
                    continue
                state = new_state(samples, ids, rank_of, num_ranks, per_node, problem.current[layer])
                norm = _split_all(state)
                if norm - best_norm < problem.price * (_moves(best) - _moves(state)):
                    best, best_norm = state, norm
            _improve(problem, best, best_norm, most_slots)
            copy_into(slot_expert[layer], best.expert)

    @entry_point
    def peaks_after_split(samples, placement, rank_of, num_ranks, first, last, peaks):
        """Write the peak rank load after the split of each sample, float64 [samples, layers], in tokens.

        `placement`: int64 [layers, slots], without empty slots. For layers `first..last-1`.
        """
        _ = sources
        for layer in range(first, last):
            scaled = np.empty((samples.shape[0], samples.shape[2]))
            _scaled(samples, layer, num_ranks, scaled)
            state = new_state(
                scaled, placement[layer].copy(), rank_of, num_ranks, num_ranks, placement[layer]
            )
            _split_all(state)
            for sample in range(samples.shape[0]):
                total, peak = 0.0, 0.0
                for expert in range(samples.shape[2]):
                    total += samples[sample, layer, expert]
                for rank in range(num_ranks):
                    peak = max(peak, state.load[sample, rank])
                peaks[sample, layer] = peak * total / num_ranks

    return improve_splits, peaks_after_split


improve_splits, peaks_after_split = _build(SOURCES)
